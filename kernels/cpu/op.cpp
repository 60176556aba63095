// torch.ops.graddrop_fused_cpu: the contract's functions on its tables, on the LibTorch stable ABI (one binary for
// every torch >= 2.10), with torch's own threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

#ifdef GRADDROP_X86
#include <cpuid.h>
#endif

#include "contract.h"
#include "level.h"
#include "oracle.h"
#include "stretch.h"
#include "subnormals.h"

namespace {

using namespace graddrop;
using torch::stable::Tensor;

constexpr int64_t ORACLE = 3;

#ifdef GRADDROP_X86
// older clangs do not know "f16c" to __builtin_cpu_supports
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

int64_t best_level() {
#ifdef GRADDROP_X86
#ifdef GRADDROP_EMULATE_AVX512
  return 2;
#endif
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 ? (avx512 ? 2 : 1) : 0;
#else
  return 0;
#endif
}

const Level& level_at(int64_t level) {
  static const int64_t best = best_level();
  STD_TORCH_CHECK(level >= 0 && level <= best, "level must be 0 to ", best, " on this processor, got ", level);
#ifdef GRADDROP_X86
  if (level == 2) return level_avx512;
  if (level == 1) return level_avx2;
#endif
  return level_default;
}

constexpr int64_t LEAST_SHARE = 4096, LARGEST_SHARE = 524288;  // elements

// Cuts all tensors together into shares of equal size; whoever is free takes the next one.
void for_all(const Level& level, const Call& call, OnStretch on_stretch) {
  std::vector<int64_t> ends(static_cast<size_t>(call.tensors));
  int64_t total = 0;
  for (int64_t t = 0; t < call.tensors; ++t) ends[static_cast<size_t>(t)] = total += call.layout[t].numel;
  if (total == 0) return;

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fair = (total / (threads * 16) + TILE - 1) / TILE * TILE;
  const int64_t share = std::clamp(fair, LEAST_SHARE, LARGEST_SHARE);
  const int64_t shares = (total + share - 1) / share;
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    const FlushSubnormals flush;
    for (int64_t k; (k = next.fetch_add(1, std::memory_order_relaxed)) < shares;) {
      const int64_t first = k * share, last = std::min(total, first + share);
      auto t = std::upper_bound(ends.begin(), ends.end(), first) - ends.begin();
      for (; t < call.tensors; ++t) {
        const int64_t numel = call.layout[t].numel, start = ends[static_cast<size_t>(t)] - numel;
        if (start >= last) break;
        // a share's bounds move down to a multiple of 128 elements of the tensor they fall in
        const int64_t begin = std::max<int64_t>(first - start, 0) / TILE * TILE;
        const int64_t end = last >= start + numel ? numel : (last - start) / TILE * TILE;
        if (begin < end) on_stretch(level, call, t, begin, end);
      }
    }
  };
  if (shares == 1 || threads == 1) return work(0, 1);
  torch::stable::parallel_for(0, std::min(threads, shares), 1, work);
}

Call call_of(const Tensor& layout, const Tensor& integers, const Tensor& reals) {
  const int64_t tensors = layout.size(0);
  STD_TORCH_CHECK(layout.size(1) * 8 == int64_t{sizeof(Layout)} && integers.size(1) * 8 == int64_t{sizeof(Integers)} &&
                      reals.size(1) * 8 == int64_t{sizeof(Reals)},
                  "tables must have the columns of graddrop_fused/contract.py");
  STD_TORCH_CHECK(integers.size(0) == tensors && reals.size(0) == tensors, "tables must have one row per tensor");
  STD_TORCH_CHECK(layout.is_contiguous() && integers.is_contiguous() && reals.is_contiguous(),
                  "tables must be contiguous");
  Call call = {};
  call.layout = static_cast<const Layout*>(layout.data_ptr());
  call.integers = static_cast<const Integers*>(integers.data_ptr());
  call.reals = static_cast<const Reals*>(reals.data_ptr());
  call.tensors = tensors;
  return call;
}

// rule: of rule(). dtypes: param + 4 * grad + 16 * state, each as Dtype.
void update(Tensor layout, Tensor integers, Tensor reals, std::optional<Tensor> rounding, int64_t rule, int64_t dtypes,
            int64_t seed, double inv_grad_scale, int64_t level) {
  Call call = call_of(layout, integers, reals);
  if (rounding.has_value()) {
    STD_TORCH_CHECK(rounding->size(0) == call.tensors && rounding->size(1) * 8 == int64_t{sizeof(Rounding)} &&
                        rounding->is_contiguous(),
                    "rounding must be contiguous and have one row per tensor and the columns of contract.py");
    call.rounding = static_cast<const Rounding*>(rounding->data_ptr());
  }
  call.rule = rule;
  call.dtypes = {static_cast<Dtype>(dtypes % 4), static_cast<Dtype>(dtypes / 4 % 4),
                 static_cast<Dtype>(dtypes / 16 % 4)};
  call.seed = static_cast<uint64_t>(seed);
  call.inv_grad_scale = inv_grad_scale;
  const RuleName name = level_default.rule_name(rule);
  STD_TORCH_CHECK(name.name != nullptr, "there is no rule number ", rule);
  call.states = name.states;
  if (level != ORACLE) return for_all(level_at(level), call, update_stretch);
  const FlushSubnormals flush;
  STD_TORCH_CHECK(oracle_update(call, name.name), "the oracle has no rule ", name.name);
}

void pack(Tensor layout, Tensor integers, Tensor reals, int64_t seed, int64_t level) {
  Call call = call_of(layout, integers, reals);
  call.seed = static_cast<uint64_t>(seed);
  level == ORACLE ? oracle_pack(call) : for_all(level_at(level), call, pack_stretch);
}

// Reads and writes what an unmasked AdamW step does, without its arithmetic: what benchmarks compare with.
void memory_floor(Tensor layout, Tensor integers, Tensor reals, int64_t level) {
  for_all(level_at(level), call_of(layout, integers, reals), floor_stretch);
}

// The number by which update() knows the rule that keeps so many states, or -1.
int64_t rule(std::string name, int64_t states) { return level_default.rule_number(name.c_str(), states); }

int64_t contract_version() { return CONTRACT_VERSION; }
int64_t mask_stream_version() { return MASK_STREAM_VERSION; }
int64_t layout_columns() { return sizeof(Layout) / 8; }
int64_t integer_columns() { return sizeof(Integers) / 8; }
int64_t real_columns() { return sizeof(Reals) / 8; }

}  // namespace

STABLE_TORCH_LIBRARY(graddrop_fused_cpu, library) {
  library.def(
      "update(Tensor layout, Tensor integers, Tensor reals, Tensor? rounding, int rule, int dtypes, int seed,"
      " float inv_grad_scale, int level) -> ()");
  library.def("pack(Tensor layout, Tensor integers, Tensor reals, int seed, int level) -> ()");
  library.def("floor(Tensor layout, Tensor integers, Tensor reals, int level) -> ()");
  library.def("rule(str name, int states) -> int");
  library.def("best_level() -> int");
  library.def("contract_version() -> int");
  library.def("mask_stream_version() -> int");
  library.def("layout_columns() -> int");
  library.def("integer_columns() -> int");
  library.def("real_columns() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(graddrop_fused_cpu, CPU, library) {
  library.impl("update", TORCH_BOX(&update));
  library.impl("pack", TORCH_BOX(&pack));
  library.impl("floor", TORCH_BOX(&memory_floor));
}

STABLE_TORCH_LIBRARY_IMPL(graddrop_fused_cpu, CompositeExplicitAutograd, library) {
  library.impl("rule", TORCH_BOX(&rule));
  library.impl("best_level", TORCH_BOX(&best_level));
  library.impl("contract_version", TORCH_BOX(&contract_version));
  library.impl("mask_stream_version", TORCH_BOX(&mask_stream_version));
  library.impl("layout_columns", TORCH_BOX(&layout_columns));
  library.impl("integer_columns", TORCH_BOX(&integer_columns));
  library.impl("real_columns", TORCH_BOX(&real_columns));
}
