#include "csrc/cpu/quantize_index.h"

#include <ATen/Parallel.h>

#include <vector>

#include "csrc/cpu/lanes.h"
#include "csrc/ops/common/index_block.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrainElements = 1 << 15;

/// The largest half <= x.
template <typename Accum>
c10::Half half_below(Accum x) {
  c10::Half half(static_cast<float>(x));
  if (static_cast<Accum>(half) <= x || half != half) return half;
  const bool negative = (half.x & 0x8000) != 0;
  half.x = half == 0 ? 0x8001 : half.x + (negative ? 1 : -1);
  return half;
}

/// The smallest half >= x, x >= 0.
template <typename Accum>
c10::Half half_above(Accum x) {
  return -half_below(-x);
}

template <typename Accum>
class BlockQuantizer {
 public:
  explicit BlockQuantizer(const QuantizeIndexParams& params)
      : p_(params),
        levels_(static_cast<Accum>((1 << p_.bits) - 1)),
        keys_(kIndexBlock * p_.dim),
        low_(p_.dim),
        high_(p_.dim),
        codes_(p_.dim + 1) {}  // an odd dim has an empty upper half at its end

  void run(const HeadRows& rows, int64_t block, uint8_t* codes, c10::Half* ranges) {
    copy_head_rows(rows, block * kIndexBlock, kIndexBlock, keys_.data(), p_.dim);
    find_ranges(ranges);
    const int64_t bytes = code_bytes(p_.dim, p_.bits);
    for (int64_t i = 0; i < kIndexBlock; ++i, codes += bytes) {
      const Accum* key = keys_.data() + i * p_.dim;
      for (int64_t d = 0; d < p_.dim; ++d) {
        const Accum code = std::nearbyint((key[d] - low_[d]) / high_[d]);
        // The first comparison also turns NaN into 0.
        codes_[d] = static_cast<uint8_t>(code > 0 ? std::min(code, levels_) : Accum(0));
      }
      for (int64_t d = 0; d < bytes; ++d) {
        codes[d] = p_.bits == 8 ? codes_[d] : codes_[d] | codes_[d + bytes] << 4;
      }
    }
  }

 private:
  /// Fills `ranges`, and low_ with the minima and high_ with the steps that divide.
  void find_ranges(c10::Half* ranges) {
    std::copy_n(keys_.data(), p_.dim, low_.data());
    std::copy_n(keys_.data(), p_.dim, high_.data());
    for (int64_t i = 1; i < kIndexBlock; ++i) {
      const Accum* key = keys_.data() + i * p_.dim;
      for (int64_t d = 0; d < p_.dim; ++d) {  // a NaN stays
        low_[d] = key[d] >= low_[d] ? low_[d] : low_[d] != low_[d] ? low_[d] : key[d];
        high_[d] = key[d] <= high_[d] ? high_[d] : high_[d] != high_[d] ? high_[d] : key[d];
      }
    }
    for (int64_t d = 0; d < p_.dim; ++d) {
      c10::Half low = half_below(low_[d]);
      c10::Half step = half_above((high_[d] - static_cast<Accum>(low)) / levels_);
      if (!std::isfinite(static_cast<float>(low)) || !std::isfinite(static_cast<float>(step))) {
        low = std::numeric_limits<c10::Half>::quiet_NaN();
        step = c10::Half(0);
      }
      ranges[d] = low;
      ranges[p_.dim + d] = step;
      low_[d] = static_cast<Accum>(low);
      high_[d] = step == 0 ? Accum(1) : static_cast<Accum>(step);
    }
  }

  const QuantizeIndexParams& p_;
  const Accum levels_;
  std::vector<Accum> keys_, low_, high_;
  std::vector<uint8_t> codes_;
};

template <typename Accum>
void quantize(const QuantizeIndexParams& p) {
  const int64_t blocks = p.keys / kIndexBlock;
  const int64_t block_bytes = kIndexBlock * code_bytes(p.dim, p.bits);
  const int64_t grain =
      std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, kIndexBlock * p.dim));
  at::parallel_for(0, p.batch * p.heads * blocks, grain, [&](int64_t begin, int64_t end) {
    BlockQuantizer<Accum> quantizer(p);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / blocks;
      quantizer.run(head_rows(p.dtype, p.k_index, head / p.heads, head % p.heads, p.keys),
                    unit % blocks, p.codes_ptr + unit * block_bytes,
                    p.ranges_ptr + unit * 2 * p.dim);
    }
  });
}

}  // namespace

void quantize_index_kernel(const QuantizeIndexParams& params) {
  if (params.dtype == at::kDouble) return quantize<double>(params);
  quantize<float>(params);
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
