"""How a task is trained, before flags: XGLUE's own recipes, and short ones for the embedded tasks."""

from dataclasses import replace

from .training import Settings

# XGLUE's, for a model of base size (understanding/unicoder/xglue.sh of github.com/microsoft/Unicoder, and the defaults
# of the scripts that it calls): the epoch by the dev average over all languages, no weight decay, no warm-up, no early
# stopping, gradients clipped to a norm of 1.
_XGLUE = Settings(
    epochs=10, batch_size=32, lr=5e-6, max_length=256, warmup=0.0, weight_decay=0.0, clip=1.0, choose="best"
)
XGLUE = {
    "ner": replace(_XGLUE, epochs=20),
    "pos": replace(_XGLUE, epochs=20, lr=2e-5, max_length=128),
    "mlqa": replace(_XGLUE, epochs=2, batch_size=12, lr=3e-5, max_length=384),
}
SHORT = {"multiemo": Settings(lr=1e-4, max_length=48)}
_INTENTS = Settings(lr=2e-4)

RECIPES = ("xglue", "short")


def recipe(task: str, name: str | None = None) -> Settings:
    """The settings of ``task``. ``name``: one of RECIPES; None: "short" for the embedded tasks, else "xglue"."""
    if name is None:
        name = "short" if task in ("intents", "multiemo") else "xglue"
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return XGLUE.get(task, _XGLUE) if name == "xglue" else SHORT.get(task, _INTENTS)


def described(settings: dict) -> str:
    """A recipe in words, from a result's ``settings``."""
    chosen = "best epoch by the dev average over all languages" if settings["choose"] == "best" else "last epoch"
    clip = f"gradients clipped to {settings['clip']:g}" if settings["clip"] else "no clipping"
    head = "head masked too" if settings["mask_head"] else "head never masked"
    return (
        f"{settings['epochs']} epochs, all of them trained, {chosen} scored; batch {settings['batch_size']}, "
        f"lr {settings['lr']:g} ({settings['decay']}, warm-up {100 * settings['warmup']:g} %), weight decay "
        f"{settings['weight_decay']:g}, {clip}, {settings['max_length']} tokens; {head}; {settings['optimizer']}"
    )
