#include "csrc/cpu/index_project.h"

#include <ATen/Parallel.h>

#include <vector>

#include "csrc/cpu/jobs.h"
#include "csrc/cpu/lanes.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kChunk = 128;  // rows of a product

HeadRows weight_rows(c10::ScalarType dtype, const void* w, int64_t j, int64_t index_dim,
                     int64_t dim) {
  return {dtype, static_cast<const char*>(w) + j * index_dim * dim * c10::elementSize(dtype), dim,
          index_dim};
}

/// Stores `count` contiguous rows as `dtype`.
template <typename Accum>
void store_rows(const Accum* rows, int64_t count, int64_t dim, c10::ScalarType dtype, void* out,
                int64_t stride) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "store_rows", [&] {
    auto* destination = static_cast<scalar_t*>(out);
    for (int64_t i = 0; i < count; ++i) {
      copy_row(rows + i * dim, destination + i * stride, dim);
    }
  });
}

template <typename Accum>
void project(const IndexProjectParams& p) {
  const int64_t chunks = (p.rows + kChunk - 1) / kChunk;
  const int64_t out_size = static_cast<int64_t>(c10::elementSize(p.out_dtype));
  const int64_t units = p.batch * p.outputs * chunks;
  const double work =
      static_cast<double>(p.batch * p.outputs * p.rows) * static_cast<double>(p.index_dim * p.dim);
  run_jobs(units, work, [&](const auto& next) {
    std::vector<Accum> x(kChunk * p.dim), w(p.index_dim * p.dim), w_t(p.dim * p.index_dim),
        staging(16 * p.dim), out(kChunk * p.index_dim);
    int64_t packed = -1;
    for (int64_t unit = next(); unit >= 0; unit = next()) {
      const int64_t j = unit / chunks % p.outputs;
      const int64_t b = unit / chunks / p.outputs;
      const int64_t first = unit % chunks * kChunk;
      const int64_t count = std::min(kChunk, p.rows - first);
      if (packed != j) {
        copy_head_rows(weight_rows(p.w_dtype, p.w_ptr, j, p.index_dim, p.dim), 0, p.index_dim,
                       w.data(), p.dim);
        pack_transposed([&](int64_t i) { return w.data() + i * p.dim; }, p.index_dim, p.dim,
                        w_t.data(), p.index_dim, staging.data());
        packed = j;
      }
      copy_head_rows(head_rows(p.x_dtype, p.x, b, p.heads[j], p.rows), first, count, x.data(),
                     p.dim);
      gemm<Accum>(count == 1 ? 1 : kChunk, p.index_dim, p.dim, x.data(), p.dim, w_t.data(),
                  p.index_dim, out.data(), p.index_dim, false);
      const int64_t offset =
          b * p.out.batch_stride + j * p.out.head_stride + first * p.out.row_stride;
      store_rows(out.data(), count, p.index_dim, p.out_dtype,
                 static_cast<char*>(p.out.ptr) + offset * out_size, p.out.row_stride);
    }
    gemm_release<Accum>();
  });
}

/// One KV or query head of x: its gradient is the sum over the outputs that read it.
template <typename Accum>
void backward_x(const IndexProjectBackwardParams& p) {
  const int64_t x_size = static_cast<int64_t>(c10::elementSize(p.x_dtype));
  at::parallel_for(0, p.batch * p.x_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<Accum> grad(kChunk * p.index_dim), w(p.outputs * p.index_dim * p.dim),
        out(kChunk * p.dim);
    for (int64_t j = 0; j < p.outputs; ++j) {
      copy_head_rows(weight_rows(p.w_dtype, p.w_ptr, j, p.index_dim, p.dim), 0, p.index_dim,
                     w.data() + j * p.index_dim * p.dim, p.dim);
    }
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / p.x_heads;
      const int64_t head = unit % p.x_heads;
      for (int64_t first = 0; first < p.rows; first += kChunk) {
        const int64_t count = std::min(kChunk, p.rows - first);
        std::fill(out.begin(), out.end(), Accum(0));
        for (int64_t j = 0; j < p.outputs; ++j) {
          if (p.heads[j] != head) continue;
          copy_head_rows(head_rows(p.grad_dtype, p.grad, b, j, p.rows), first, count, grad.data(),
                         p.index_dim);
          gemm<Accum>(kChunk, p.dim, p.index_dim, grad.data(), p.index_dim,
                      w.data() + j * p.index_dim * p.dim, p.dim, out.data(), p.dim, true);
        }
        store_rows(out.data(), count, p.dim, p.x_dtype,
                   static_cast<char*>(p.grad_x_ptr) + (unit * p.rows + first) * p.dim * x_size,
                   p.dim);
      }
    }
    gemm_release<Accum>();
  });
}

template <typename Accum>
void backward_w(const IndexProjectBackwardParams& p) {
  const int64_t w_size = static_cast<int64_t>(c10::elementSize(p.w_dtype));
  at::parallel_for(0, p.outputs, 1, [&](int64_t begin, int64_t end) {
    std::vector<Accum> grad(kChunk * p.index_dim), grad_t(p.index_dim * kChunk),
        staging(16 * p.index_dim), x(kChunk * p.dim), out(p.index_dim * p.dim);
    for (int64_t j = begin; j < end; ++j) {
      std::fill(out.begin(), out.end(), Accum(0));
      for (int64_t b = 0; b < p.batch; ++b) {
        const HeadRows grad_rows = head_rows(p.grad_dtype, p.grad, b, j, p.rows);
        const HeadRows x_rows = head_rows(p.x_dtype, p.x, b, p.heads[j], p.rows);
        for (int64_t first = 0; first < p.rows; first += kChunk) {
          const int64_t count = std::min(kChunk, p.rows - first);
          copy_head_rows(grad_rows, first, count, grad.data(), p.index_dim);
          copy_head_rows(x_rows, first, count, x.data(), p.dim);
          std::fill(grad.begin() + count * p.index_dim, grad.end(), Accum(0));
          std::fill(x.begin() + count * p.dim, x.end(), Accum(0));
          pack_transposed([&](int64_t i) { return grad.data() + i * p.index_dim; }, kChunk,
                          p.index_dim, grad_t.data(), kChunk, staging.data());
          gemm<Accum>(p.index_dim, p.dim, kChunk, grad_t.data(), kChunk, x.data(), p.dim,
                      out.data(), p.dim, true);
        }
      }
      store_rows(out.data(), p.index_dim, p.dim, p.w_dtype,
                 static_cast<char*>(p.grad_w_ptr) + j * p.index_dim * p.dim * w_size, p.dim);
    }
    gemm_release<Accum>();
  });
}

template <typename Accum>
void backward(const IndexProjectBackwardParams& p) {
  if (p.grad_x_ptr) backward_x<Accum>(p);
  if (p.grad_w_ptr) backward_w<Accum>(p);
}

}  // namespace

void index_project_kernel(const IndexProjectParams& params) {
  if (params.x_dtype == at::kDouble || params.w_dtype == at::kDouble) {
    return project<double>(params);
  }
  project<float>(params);
}

void index_project_backward_kernel(const IndexProjectBackwardParams& params) {
  if (params.x_dtype == at::kDouble || params.w_dtype == at::kDouble) {
    return backward<double>(params);
  }
  backward<float>(params);
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
