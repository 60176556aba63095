"""What all contestants of a case share: parameters, gradients and moments."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

STEP = 10  # steps taken before: nobody starts from state of its own


class Tensors:
    """Parameters with gradients, and AdamW's moments as after STEP steps.

    Args:
        params: leaf tensors; each gets a new gradient.
        state_dtype: of the moments. None: the parameters'.
    """

    def __init__(self, params: Sequence[Tensor], state_dtype: torch.dtype | None = None):
        self.params = list(params)
        for param in self.params:
            param.grad = torch.randn_like(param).mul_(1e-3)
        self._make_moments(state_dtype)
        self._gradients: list[Tensor] = []

    @classmethod
    def random(cls, shapes, dtype: torch.dtype, state_dtype: torch.dtype | None = None, device="cpu") -> "Tensors":
        torch.manual_seed(0)
        return cls(
            [torch.randn(s, dtype=dtype, device=device).mul_(0.02).requires_grad_() for s in shapes], state_dtype
        )

    def _make_moments(self, dtype: torch.dtype | None) -> None:
        self.exp_avgs = [torch.zeros_like(p, dtype=dtype, requires_grad=False) for p in self.params]
        # no denormals: they would slow one contestant's arithmetic and not another's
        self.exp_avg_sqs = [torch.full_like(p, 1e-8, dtype=dtype, requires_grad=False) for p in self.params]

    def with_moments_like_params(self) -> "Tensors":
        """The same parameters and gradients with moments of the parameters' dtype."""
        other = copy.copy(self)
        other._make_moments(None)
        return other

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.params)

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    @property
    def state_dtype(self) -> torch.dtype:
        return self.exp_avgs[0].dtype

    @property
    def bytes_per_element(self) -> int:
        """What a step without a mask reads and writes: p, g, m, v and p, m, v."""
        return 3 * self.dtype.itemsize + 4 * self.state_dtype.itemsize

    def groups(self) -> list[dict]:
        """A param group, and so a layer, for each tensor."""
        return [{"params": [param]} for param in self.params]

    def give(self, optimizer, count=torch.tensor):
        """The optimizer with the shared moments. count: makes a step count of a float."""
        for param, m, v in zip(self.params, self.exp_avgs, self.exp_avg_sqs, strict=True):
            optimizer.state[param] = {"step": count(float(STEP)), "exp_avg": m, "exp_avg_sq": v}
        return optimizer

    def save_gradients(self) -> None:
        """Keep a copy, for contestants that mask gradients in place."""
        self._gradients = [param.grad.clone() for param in self.params]

    def restore_gradients(self) -> None:
        torch._foreach_copy_([param.grad for param in self.params], self._gradients)


class Training(Tensors):
    """A small XLM-R that can be trained on random tokens: what an optimizer's step is compared with."""

    def __init__(self, layers: int, width: int, sequences: int, tokens: int, vocabulary: int = 8192):
        from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

        torch.manual_seed(0)
        config = XLMRobertaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            intermediate_size=4 * width,
            max_position_embeddings=tokens + 2,
        )
        self.model: nn.Module = XLMRobertaForSequenceClassification(config).train()
        self.ids = torch.randint(2, vocabulary, (sequences, tokens))
        super().__init__(list(self.model.parameters()))

    def forward_and_backward(self) -> None:
        self.model.zero_grad(set_to_none=False)  # the tables of all contestants point at these gradients
        self.model(input_ids=self.ids, labels=self.ids[:, 0] % 2).loss.backward()
