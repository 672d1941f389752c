#include "cross_image_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "cross_image_attention_kernels.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const AttentionKernels attention_kernels;)

namespace {

const AttentionKernels& kernels() { return WSSS_CHOOSE_ISA(attention_kernels); }

constexpr int kRows = 72;                   // queries whose scores a thread holds: a multiple of the kernels' tile
constexpr double kProductsPerThread = 1e6;  // below, meeting costs more than it brings

// The entries each image may use, in their order.
class Allowed {
 public:
  Allowed(const uint8_t* mask, const AttentionShape& shape) {
    starts_.push_back(0);
    for (int64_t b = 0; b < shape.batch; ++b) {
      for (int64_t m = 0; m < shape.entries; ++m) {
        if (!mask || mask[b * shape.entries + m]) entries_.push_back(int32_t(m));
      }
      starts_.push_back(entries_.size());
    }
  }
  const int32_t* of(int64_t b) const { return entries_.data() + starts_[b]; }
  int count(int64_t b) const { return int(starts_[b + 1] - starts_[b]); }
  int most() const {
    size_t most = 0;
    for (size_t b = 1; b < starts_.size(); ++b) most = std::max(most, starts_[b] - starts_[b - 1]);
    return int(most);
  }
  double total() const { return double(entries_.size()); }

 private:
  std::vector<int32_t> entries_;
  std::vector<size_t> starts_;
};

// A matrix in panels, packed by the whole team.
class Panels {
 public:
  Panels(size_t steps, size_t columns) : data_(steps * panels(columns) * kernels().panel) {}
  static size_t panels(size_t columns) { return (columns + kernels().panel - 1) / kernels().panel; }
  const float* get() const { return data_.get(); }

  // B[k, j] = from[index[k], j]
  void pack(const float* from, int64_t row, const int32_t* index, int steps, int columns, const Team& team) const {
    const int panel = kernels().panel, count = int(panels(columns));
    for (int p = int(team.begin(count)), end = int(team.end(count)); p < end; ++p) {
      kernels().pack(from + p * panel, row, index, steps, std::min(panel, columns - p * panel), at(p, steps));
    }
  }
  // B[k, j] = from[index[j], k]
  void pack_rows(const float* from, int64_t row, const int32_t* index, int steps, int columns, const Team& team) const {
    const int panel = kernels().panel, count = int(panels(columns));
    for (int p = int(team.begin(count)), end = int(team.end(count)); p < end; ++p) {
      kernels().pack_rows(from, row, index + p * panel, steps, std::min(panel, columns - p * panel), at(p, steps));
    }
  }

 private:
  float* at(int p, int steps) const { return data_.get() + ptrdiff_t(p) * steps * kernels().panel; }
  const Buffer<float> data_;
};

struct Head {  // of an image
  int64_t b, query, memory;
  Head(const AttentionShape& shape, int64_t number) : b(number / shape.heads) {
    const int64_t head = number % shape.heads;
    query = number * shape.queries;
    memory = (shape.shared ? head : number) * shape.entries * shape.dim;
  }
};

Product product(const float* a, ptrdiff_t a_row, const Panels& b, int rows, int steps, int columns, float* c,
                ptrdiff_t c_row) {
  return {a, a_row, 1, b.get(), rows, steps, columns, c, c_row, nullptr, false};
}

int line_of(int entries) { return int(Panels::panels(entries)) * kernels().panel; }

float log_threshold(const AttentionOptions& options) {
  return options.threshold > 0 ? float(std::log(options.threshold)) : -std::numeric_limits<float>::infinity();
}

}  // namespace

void cross_image_attention_cpu(const float* query, const float* keys, const float* values, const uint8_t* mask,
                               float* out, float* entropy, float* stats, AttentionShape shape,
                               const AttentionOptions& options, int threads) {
  const Allowed allowed(mask, shape);
  const int dim = int(shape.dim), most = allowed.most(), line = line_of(most);
  const double work = allowed.total() * double(shape.heads) * double(shape.queries) * dim;
  threads = worthwhile_threads(usable_threads(threads), work, kProductsPerThread);
  const Panels key_columns(dim, most), value_rows(values ? most : 0, dim);
  const Buffer<float> scores(size_t(threads) * kRows * line);
  parallel(threads, [&](const Team& team) {
    float* const mine = scores.get() + ptrdiff_t(team.thread) * kRows * line;
    for (int64_t number = 0; number < shape.batch * shape.heads; ++number) {
      const Head head(shape, number);
      const int count = allowed.count(head.b);
      const int32_t* const entries = allowed.of(head.b);
      if (count > 0) {
        team.barrier();  // the panels are still read
        key_columns.pack_rows(keys + head.memory, dim, entries, dim, count, team);
        if (values) value_rows.pack(values + head.memory, dim, entries, count, dim, team);
        team.barrier();
      }
      const int64_t end = team.end(shape.queries);
      for (int64_t q = team.begin(shape.queries); q < end; q += kRows) {
        const int rows = int(std::min<int64_t>(kRows, end - q));
        const int64_t place = head.query + q;
        if (count == 0) {
          if (out) std::fill_n(out + place * dim, int64_t(rows) * dim, 0.0f);
          if (entropy) std::fill_n(entropy + place, rows, 0.0f);
          std::fill_n(stats + place * kAttentionStats, rows * kAttentionStats, 0.0f);
          continue;
        }
        kernels().multiply(product(query + place * dim, dim, key_columns, rows, dim, count, mine, line));
        const int top = options.top_k < count ? int(options.top_k) : 0;
        kernels().attend({mine, line, rows, count, options.scale, top, log_threshold(options),
                          stats + place * kAttentionStats, entropy ? entropy + place : nullptr});
        if (out) kernels().multiply(product(mine, line, value_rows, rows, count, dim, out + place * dim, dim));
      }
    }
  });
}

void cross_image_attention_backward_cpu(const float* grad, const float* grad_entropy, const float* query,
                                        const float* keys, const float* values, const uint8_t* mask, const float* stats,
                                        float* grad_query, float* grad_keys, float* grad_values, AttentionShape shape,
                                        float scale, int threads) {
  const Allowed allowed(mask, shape);
  const int dim = int(shape.dim), most = allowed.most(), line = line_of(most);
  const double work = allowed.total() * double(shape.heads) * double(shape.queries) * dim;
  threads = worthwhile_threads(usable_threads(threads), work, kProductsPerThread);
  const int panel = kernels().panel, panels = int(Panels::panels(dim)), sides = !grad_keys ? 0 : values ? 2 : 1;
  const Panels key_columns(dim, most), value_columns(dim, values ? most : 0), key_rows(grad_query ? most : 0, dim);
  // Of as many queries as the team holds at a time; then each thread takes panels of the memory's gradients, whose sums
  // go on from one such step to the next.
  const int held = kRows * threads;
  const Buffer<float> scores(size_t(held) * line), weights(size_t(held) * line);
  const Buffer<float> columns(size_t(threads) * held * panel);
  parallel(threads, [&](const Team& team) {
    float* const column = columns.get() + ptrdiff_t(team.thread) * held * panel;
    for (int64_t number = 0; number < shape.batch * shape.heads; ++number) {
      const Head head(shape, number);
      const int count = allowed.count(head.b);
      const int32_t* const entries = allowed.of(head.b);
      const float* const queries = query + head.query * dim;
      if (count == 0) {
        const int64_t begin = team.begin(shape.queries), end = team.end(shape.queries);
        if (grad_query) std::fill_n(grad_query + (head.query + begin) * dim, (end - begin) * dim, 0.0f);
        continue;
      }
      key_columns.pack_rows(keys + head.memory, dim, entries, dim, count, team);
      if (values) value_columns.pack_rows(values + head.memory, dim, entries, dim, count, team);
      if (grad_query) key_rows.pack(keys + head.memory, dim, entries, count, dim, team);
      team.barrier();
      const int steps = int((shape.queries + held - 1) / held);
      for (int step = 0; step < steps; ++step) {
        const int64_t from = shape.queries * step / steps, to = shape.queries * (step + 1) / steps;
        const int64_t begin = team.begin(to - from), rows = team.end(to - from) - begin;
        const int64_t place = head.query + from + begin;
        float* const p = scores.get() + begin * line;
        float* const w = weights.get() + begin * line;
        if (rows > 0) {
          kernels().multiply(product(query + place * dim, dim, key_columns, int(rows), dim, count, p, line));
          if (values)
            kernels().multiply(product(grad + place * dim, dim, value_columns, int(rows), dim, count, w, line));
          kernels().differentiate({p, w, line, int(rows), count, scale, stats + place * kAttentionStats,
                                   grad_entropy ? grad_entropy + place : nullptr, values != nullptr});
          if (grad_query)
            kernels().multiply(product(w, line, key_rows, int(rows), count, dim, grad_query + place * dim, dim));
        }
        team.barrier();
        const int length = int(to - from);
        for (int unit = int(team.begin(sides * panels)); unit < int(team.end(sides * panels)); ++unit) {
          const bool of_values = unit >= panels;
          const int first = unit % panels * panel, width = std::min(panel, dim - first);
          const float* const right = (of_values ? grad + head.query * dim : queries) + from * dim + first;
          kernels().pack(right, dim, nullptr, length, width, column);
          float* const sums = (of_values ? grad_values : grad_keys) + head.memory + first;
          kernels().multiply({of_values ? scores.get() : weights.get(), 1, line, column, count, length, width, sums,
                              dim, entries, true});
        }
        team.barrier();
      }
    }
  });
}

}  // namespace wsss
