#include "step.h"

#include <initializer_list>

#include "dtypes.h"
#include "masks.h"

namespace graddrop {
namespace {

alignas(64) const char ZEROS[TILE * sizeof(double)] = {};

struct alignas(64) Buffer {
  char bytes[TILE * sizeof(double)];
};

template <class T>
void gather_as(const char* from, const int64_t* at, int count, char* to) {
  constexpr int64_t SIZE = sizeof(T);
  for (int i = 0; i < count; ++i) std::memcpy(to + i * SIZE, from + at[i] * SIZE, SIZE);
}
template <class T>
void scatter_as(const char* from, const int64_t* at, int count, char* to) {
  constexpr int64_t SIZE = sizeof(T);
  for (int i = 0; i < count; ++i) std::memcpy(to + at[i] * SIZE, from + i * SIZE, SIZE);
}
inline void gather(int64_t size, const char* from, const int64_t* at, int count, char* to) {
  (size == 8 ? gather_as<uint64_t> : size == 4 ? gather_as<uint32_t> : gather_as<uint16_t>)(from, at, count, to);
}
inline void scatter(int64_t size, const char* from, const int64_t* at, int count, char* to) {
  (size == 8 ? scatter_as<uint64_t> : size == 4 ? scatter_as<uint32_t> : scatter_as<uint16_t>)(from, at, count, to);
}

template <class To, class From>
void convert_as(const void* from, void* to) {
  for (int i = 0; i < TILE; ++i) {
    if constexpr (sizeof(To) == sizeof(double)) {
      static_cast<To*>(to)[i] = to_double(static_cast<const From*>(from)[i]);
    } else {
      static_cast<To*>(to)[i] = to_float(static_cast<const From*>(from)[i]);
    }
  }
}
template <class To>
void convert(Dtype dtype, const void* from, void* to) {
  switch (dtype) {
    case Dtype::FLOAT32:
      return convert_as<To, float>(from, to);
    case Dtype::BFLOAT16:
      return convert_as<To, bfloat16>(from, to);
    case Dtype::FLOAT16:
      return convert_as<To, float16>(from, to);
    case Dtype::FLOAT64:
      return convert_as<To, double>(from, to);
  }
}

// Multiplies the tile by 1 + std * N(0, 1); global(i) is the global index of its element i.
template <class Real, class Global>
void add_noise(MaskWords& words, Global global, int count, double std, void* grad) {
  auto* g = static_cast<Real*>(grad);
  const bool neighbours = global(count - 1) - global(0) == static_cast<uint64_t>(count) - 1;
  for (int i = 0; i < count; ++i) {
    g[i] *= static_cast<Real>(1.0 + std * static_cast<double>(words.normal(global(i), neighbours)));
  }
}

void round_to(Dtype dtype, const void* from, void* to) {
  for (int i = 0; i < TILE; ++i) {
    const auto* real = static_cast<const float*>(from);
    if (dtype == Dtype::FLOAT64) static_cast<double*>(to)[i] = static_cast<const double*>(from)[i];
    if (dtype == Dtype::FLOAT32) from_float(real[i], static_cast<float*>(to) + i);
    if (dtype == Dtype::BFLOAT16) from_float(real[i], static_cast<bfloat16*>(to) + i);
    if (dtype == Dtype::FLOAT16) from_float(real[i], static_cast<float16*>(to) + i);
  }
}

// Local elements [start, stop) that one call of a level can take, but for short tiles at both ends.
struct Region {
  int64_t start, stop;
  bool kept;  // of a block mask; else unused
};

// Cuts [begin, end) into regions: one, but for block masks, whose neighbouring blocks of one decision make a region.
class Regions {
 public:
  Regions(MaskWords& words, const Layout& row, int64_t begin, int64_t end)
      : words_(words), offset_(row.offset), at_(begin), end_(end) {}

  bool next(Region& region) {
    if (at_ == end_) return false;
    region = {at_, end_, true};
    if (words_.kind() == Mask::BLOCK) {
      region.kept = decide();
      do {
        region.stop = at_ = words_.block_end(offset_ + at_) - offset_;
      } while (at_ < end_ && decide() == region.kept);
    }
    region.stop = at_ = region.stop < end_ ? region.stop : end_;
    return true;
  }

 private:
  bool decide() { return words_.block(static_cast<uint64_t>(offset_ + at_)); }

  MaskWords& words_;
  int64_t offset_, at_, end_;
};

// Elements from start on to the next tile: of the parameter where the mask is drawn, else of the local tensor.
int64_t to_tile(const MaskWords& words, const Layout& row, int64_t start) {
  const bool global = words.kind() == Mask::ELEMENT || words.kind() == Mask::BLOCK;
  return global ? (TILE - (row.offset + start) % TILE) % TILE : 0;
}

Numbers numbers_of(const Reals& reals, Effect effect, double inv_grad_scale) {
  // a kept element's whole step is rescaled under UPDATE, else its gradient
  const double step_scale = effect == Effect::UPDATE ? reals.rescale : 1.0;
  const double grad_scale = effect == Effect::UPDATE ? 1.0 : reals.rescale;
  // step_size * m / (sqrt(v) / bc2 + eps) = (step_size * bc2) * m / (sqrt(v) + eps * bc2)
  const Scalars<double> f64 = {
      inv_grad_scale * reals.sign * grad_scale,
      1.0 - step_scale * (1.0 - reals.decay),
      1.0 - reals.beta1,
      reals.beta2,
      1.0 - reals.beta2,
      step_scale * reals.step_size * reals.bias_correction2_sqrt,
      reals.eps * reals.bias_correction2_sqrt,
  };
  const auto round = [](double x) { return static_cast<float>(x); };
  return {{round(f64.grad_scale), round(f64.decay), round(f64.one_minus_beta1), round(f64.beta2),
           round(f64.one_minus_beta2), round(f64.step), round(f64.eps)},
          f64};
}

// One tensor's gradient as the kernels take it: its dtype or the arithmetic's, noise applied.
class Gradient {
 public:
  Gradient(const Call& call, int64_t tensor, Dtype wanted, bool noisy)
      : dtype_(call.grad), noise_std_(call.reals[tensor].noise_std), noisy_(noisy),
        real_(wanted == Dtype::FLOAT64 ? Dtype::FLOAT64 : Dtype::FLOAT32),
        convert_(noisy || (call.grad != wanted && call.grad != real_)) {}

  bool converts() const { return convert_; }
  Dtype dtype() const { return convert_ ? real_ : dtype_; }

  // global(i): global index of the tile's element i
  template <class Global>
  const char* prepare(MaskWords& words, const char* grad, int count, Global global) {
    if (!convert_) return grad;
    real_ == Dtype::FLOAT64 ? prepare_as<double>(words, grad, count, global)
                            : prepare_as<float>(words, grad, count, global);
    return buffer_.bytes;
  }

 private:
  template <class Real, class Global>
  void prepare_as(MaskWords& words, const char* grad, int count, Global global) {
    convert<Real>(dtype_, grad, buffer_.bytes);
    if (noisy_) add_noise<Real>(words, global, count, noise_std_, buffer_.bytes);
  }

  Dtype dtype_;
  double noise_std_;
  bool noisy_;
  Dtype real_;
  bool convert_;
  Buffer buffer_;
};

}  // namespace

void adamw_stretch(const Level& level, const Call& call, int64_t tensor, int64_t begin, int64_t end) {
  const Layout& row = call.layout[tensor];
  const Effect effect = call.integers[tensor].effect;
  MaskWords words(level, call, tensor);
  const Mask kind = words.kind();
  if (kind == Mask::DROP && effect == Effect::FREEZE) return;

  const bool zero_grad = row.grad == 0 || (kind == Mask::DROP && effect == Effect::GRADIENT);
  const bool noisy = kind == Mask::GAUSSIAN && effect != Effect::UPDATE && !zero_grad;
  const bool all = kind == Mask::KEEP || kind == Mask::GAUSSIAN || (kind == Mask::DROP && effect == Effect::GRADIENT);
  const Select select = all ? Select::ALL : static_cast<Select>(static_cast<int>(effect) + 1);
  Gradient gradient(call, tensor, call.param, noisy);
  const AdamwRun update = level.adamw(call.param, gradient.dtype(), call.state, select, row.vmax != 0);
  const AdamwRun update_kept = level.adamw(call.param, gradient.dtype(), call.state, Select::ALL, row.vmax != 0);
  const Numbers numbers = numbers_of(call.reals[tensor], effect, call.inv_grad_scale);

  const int64_t param_size = size_of(call.param), grad_size = size_of(call.grad), state_size = size_of(call.state);
  char *const p = reinterpret_cast<char*>(row.param), *const g = reinterpret_cast<char*>(row.grad);
  char *const m = reinterpret_cast<char*>(row.m), *const v = reinterpret_cast<char*>(row.v);
  char* const vmax = reinterpret_cast<char*>(row.vmax);
  uint32_t bits[4] = {};
  Buffer p_tile, g_tile, m_tile, v_tile, vmax_tile;  // for tiles that are short or scattered
  const auto clear = [&] {
    for (Buffer* tile : {&p_tile, &g_tile, &m_tile, &v_tile, &vmax_tile}) std::memset(tile->bytes, 0, sizeof(Buffer));
  };
  Run gathered = {p_tile.bytes, g_tile.bytes, m_tile.bytes, v_tile.bytes, vmax ? vmax_tile.bytes : nullptr, 1};
  gathered.words = bits;

  if (!unit(row.param_stride, row) || !unit(row.grad_stride, row) || !unit(row.global_stride, row)) {
    Elements at;
    for (int64_t start = begin; start < end; start += TILE) {
      const int count = static_cast<int>(end - start < TILE ? end - start : TILE);
      walk(row, start, count, at);
      words.strided(start, count, at.global, bits);
      if (effect == Effect::FREEZE && (bits[0] | bits[1] | bits[2] | bits[3]) == 0) continue;
      if (count < TILE) clear();
      gather(param_size, p, at.param, count, p_tile.bytes);
      gather(state_size, m, at.param, count, m_tile.bytes);
      gather(state_size, v, at.param, count, v_tile.bytes);
      if (vmax) gather(state_size, vmax, at.param, count, vmax_tile.bytes);
      if (!zero_grad) gather(grad_size, g, at.grad, count, g_tile.bytes);
      const auto global = [&](int i) { return at.global[i]; };
      gathered.g = zero_grad ? ZEROS : gradient.prepare(words, g_tile.bytes, count, global);
      update(gathered, numbers);
      scatter(param_size, p_tile.bytes, at.param, count, p);
      scatter(state_size, m_tile.bytes, at.param, count, m);
      scatter(state_size, v_tile.bytes, at.param, count, v);
      if (vmax) scatter(state_size, vmax_tile.bytes, at.param, count, vmax);
    }
    return;
  }

  const auto first_of = [&](int64_t start) { return static_cast<uint64_t>(row.offset + start); };
  const auto tiles_of = [&](int64_t start, int64_t tiles, bool no_grad) {
    Run run = {p + start * param_size, no_grad ? ZEROS : g + start * grad_size, m + start * state_size,
               v + start * state_size, vmax ? vmax + start * state_size : nullptr, tiles};
    run.grad_step = no_grad ? 0 : TILE;
    run.words = bits;
    return run;
  };
  const auto prepared = [&](const char* from, int64_t start, int count) {
    const auto global = [first = first_of(start)](int i) { return first + static_cast<uint64_t>(i); };
    return gradient.prepare(words, from, count, global);
  };
  const auto short_tile = [&](int64_t start, int count, bool no_grad) {
    const auto bytes = [count](int64_t size) { return static_cast<size_t>(count * size); };
    const Run there = tiles_of(start, 1, no_grad);
    clear();
    std::memcpy(p_tile.bytes, there.p, bytes(param_size));
    std::memcpy(m_tile.bytes, there.m, bytes(state_size));
    std::memcpy(v_tile.bytes, there.v, bytes(state_size));
    if (vmax) std::memcpy(vmax_tile.bytes, there.vmax, bytes(state_size));
    if (!no_grad) std::memcpy(g_tile.bytes, there.g, bytes(grad_size));
    if (!all) words.linear(start, count, bits);
    gathered.g = no_grad ? ZEROS : prepared(g_tile.bytes, start, count);
    update(gathered, numbers);
    std::memcpy(there.p, p_tile.bytes, bytes(param_size));
    std::memcpy(there.m, m_tile.bytes, bytes(state_size));
    std::memcpy(there.v, v_tile.bytes, bytes(state_size));
    if (vmax) std::memcpy(there.vmax, vmax_tile.bytes, bytes(state_size));
  };
  const auto full_tiles = [&](int64_t start, int64_t tiles, bool kept, bool no_grad) {
    Run run = tiles_of(start, tiles, no_grad);
    if (kind == Mask::BLOCK && (kept || effect == Effect::GRADIENT)) return update_kept(run, numbers);
    if (kind == Mask::ELEMENT) {
      run.stream = &words.stream();
      run.first_tile = first_of(start) / TILE;
    } else if (kind == Mask::PACKED) {
      run.words = reinterpret_cast<const uint32_t*>(row.packed) + start / 32;
    } else if (!all) {
      words.linear(start, TILE, bits);  // everything dropped
      run.words_step = 0;
    }
    update(run, numbers);
  };
  const auto converted_tile = [&](int64_t start) {
    Run run = tiles_of(start, 1, false);
    if (!all) words.linear(start, TILE, bits);
    run.g = prepared(static_cast<const char*>(run.g), start, TILE);
    update(run, numbers);
  };

  Regions regions(words, row, begin, end);
  for (Region region; regions.next(region);) {
    if (!region.kept && effect == Effect::FREEZE) continue;
    const bool no_grad = zero_grad || (!region.kept && effect == Effect::GRADIENT);
    int64_t at = region.start;
    const int64_t head = to_tile(words, row, at);
    if (head > 0) {
      const int64_t count = head < region.stop - at ? head : region.stop - at;
      short_tile(at, static_cast<int>(count), no_grad);
      at += count;
    }
    const int64_t tiles = (region.stop - at) / TILE;
    if (tiles > 0 && (no_grad || !gradient.converts())) {
      full_tiles(at, tiles, region.kept, no_grad);
    } else {
      for (int64_t t = 0; t < tiles; ++t) converted_tile(at + t * TILE);
    }
    at += tiles * TILE;
    if (at < region.stop) short_tile(at, static_cast<int>(region.stop - at), no_grad);
  }
}

void mask_stretch(const Level& level, const Call& call, int64_t tensor, int64_t begin, int64_t end) {
  const Layout& row = call.layout[tensor];
  if (row.grad == 0) return;
  MaskWords words(level, call, tensor);
  const bool noisy = words.kind() == Mask::GAUSSIAN;
  const double scale = call.reals[tensor].rescale, std = call.reals[tensor].noise_std;
  const bool wide = call.grad == Dtype::FLOAT64;
  const MaskTile multiply = level.mask(call.grad), multiply_real = level.mask(wide ? Dtype::FLOAT64 : Dtype::FLOAT32);
  const int64_t size = size_of(call.grad);
  char* const g = reinterpret_cast<char*>(row.grad);
  const bool linear = unit(row.grad_stride, row) && unit(row.global_stride, row);
  uint32_t bits[4];
  Buffer tile;
  Elements at;

  int count;
  for (int64_t start = begin; start < end; start += count) {
    const int64_t head = linear ? to_tile(words, row, start) : 0, wanted = head > 0 ? head : TILE;
    count = static_cast<int>(wanted < end - start ? wanted : end - start);
    char* const from = g + start * size;
    if (linear) {
      words.linear(start, count, bits);
      if (count == TILE && !noisy) {
        multiply(from, bits, scale);
        continue;
      }
    } else {
      walk(row, start, count, at);
      words.strided(start, count, at.global, bits);
    }
    std::memset(tile.bytes, 0, sizeof tile.bytes);
    linear ? void(std::memcpy(tile.bytes, from, static_cast<size_t>(count * size)))
           : gather(size, g, at.grad, count, tile.bytes);
    if (noisy) {
      Buffer real;
      wide ? convert<double>(call.grad, tile.bytes, real.bytes) : convert<float>(call.grad, tile.bytes, real.bytes);
      const auto global = [&](int i) { return linear ? static_cast<uint64_t>(row.offset + start + i) : at.global[i]; };
      wide ? add_noise<double>(words, global, count, std, real.bytes)
           : add_noise<float>(words, global, count, std, real.bytes);
      multiply_real(real.bytes, bits, scale);
      round_to(call.grad, real.bytes, tile.bytes);
    } else {
      multiply(tile.bytes, bits, scale);
    }
    linear ? void(std::memcpy(from, tile.bytes, static_cast<size_t>(count * size)))
           : scatter(size, tile.bytes, at.grad, count, g);
  }
}

void pack_stretch(const Level& level, const Call& call, int64_t tensor, int64_t begin, int64_t end) {
  const Layout& row = call.layout[tensor];
  MaskWords words(level, call, tensor);
  const bool linear = unit(row.global_stride, row);
  Elements at;
  uint32_t bits[4];
  for (int64_t start = begin; start < end; start += TILE) {
    const int count = static_cast<int>(end - start < TILE ? end - start : TILE);
    if (linear) {
      words.linear(start, count, bits);
    } else {
      walk(row, start, count, at);
      words.strided(start, count, at.global, bits);
    }
    std::memcpy(reinterpret_cast<char*>(row.packed) + start / 8, bits, static_cast<size_t>((count + 31) / 32) * 4);
  }
}

void stream_stretch(const Level& level, const Call& call, int64_t tensor, int64_t begin, int64_t end) {
  const Layout& row = call.layout[tensor];
  const auto at = [](int64_t base, int64_t start) { return reinterpret_cast<float*>(base) + start; };
  for (int64_t start = begin; start + TILE <= end; start += TILE) {
    level.stream(at(row.param, start), at(row.grad, start), at(row.m, start), at(row.v, start),
                 static_cast<float>(call.inv_grad_scale));
  }
}

}  // namespace graddrop
