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

constexpr int kPanelsPerThread = 8;         // of queries, between two meetings of the threads in the backward pass
constexpr double kProductsPerThread = 1e6;  // below, meeting costs more than it brings

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

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

struct Head {  // of an image
  int64_t number, b, query, memory, stats;
  Head(const AttentionShape& shape, int64_t number)
      : number(number),
        b(number / shape.heads),
        query(number * shape.queries * shape.dim),
        memory((shape.shared ? number % shape.heads : number) * shape.entries * shape.dim),
        stats(number * shape.queries) {}
};

// Queries side by side in one panel, within the share of a thread. Where panels begin does not depend on the threads.
struct Piece {
  int64_t panel, first;  // query
  int column, count;     // column of the panel
};
template <class Body>
void for_each_piece(const Team& team, int64_t from, int64_t to, const Body& body) {  // from: the first of a panel
  const int64_t lanes = kernels().lanes, panel = kernels().panel, vectors = parts(to - from, lanes);
  const int64_t end = std::min(to, from + team.end(vectors) * lanes);
  for (int64_t first = from + team.begin(vectors) * lanes; first < end;) {
    const int column = int(first % panel), count = int(std::min(panel - column, end - first));
    body(Piece{first / panel, first, column, count});
    first += count;
  }
}

// A map of the queries, channels by steps of `channel`.
struct Map {
  ptrdiff_t channel, query;
  int dim;
  Map(const AttentionShape& shape, bool channels_first)
      : channel(channels_first ? shape.queries : 1), query(channels_first ? 1 : shape.dim), dim(int(shape.dim)) {}
  void pack(const float* map, const Piece& piece, float* panel) const {
    if (query == 1) {
      kernels().pack(map + piece.first, channel, nullptr, dim, piece.count, panel);
    } else {
      kernels().pack_rows(map + piece.first * query, query, nullptr, dim, piece.count, panel, kernels().panel, 0);
    }
  }
};

// Rows of the allowed entries as the left factor of scores, or where they lie if all are allowed.
class Rows {
 public:
  Rows(bool gathers, size_t most, int dim) : data_(gathers ? most * dim : 0), dim_(dim), gathers_(gathers) {}
  const float* pack(const float* memory, const int32_t* entries, int count, const Team& team) const {
    if (!gathers_) return memory;
    for (int64_t m = team.begin(count); m < team.end(count); ++m) {
      std::copy_n(memory + int64_t(entries[m]) * dim_, dim_, data_.get() + m * dim_);
    }
    return data_.get();
  }

 private:
  const Buffer<float> data_;
  const int dim_;
  const bool gathers_;
};

// What the weights of a query are multiplied with: values, or keys for the gradient of the query.
class Content {
 public:
  Content(const Map& map, size_t most)
      : map_(map),
        line_(parts(map.query == 1 ? most : map.dim, kernels().panel) * kernels().panel),
        data_(size_t(line_) * (map.query == 1 ? map.dim : most)) {}
  void pack(const float* memory, const int32_t* entries, int count, const Team& team) const {
    const int panel = kernels().panel, units = int(parts(map_.dim, panel));
    const int begin = int(team.begin(units)) * panel, end = std::min(int(team.end(units)) * panel, map_.dim);
    if (begin >= end) return;
    if (map_.query == 1) {  // [d, entries]
      kernels().pack_rows(memory + begin, map_.dim, entries, end - begin, count, data_.get() + begin * line_, line_,
                          panel);
    } else {  // panels of channels
      kernels().pack(memory + begin, map_.dim, entries, count, end - begin, data_.get() + ptrdiff_t(begin) * count);
    }
  }
  // Of the queries of a piece in map: weights [count, panel] times the entries, plus start.
  void mix(const float* weights, int count, const Piece& piece, float* map, const float* start) const {
    const int panel = kernels().panel;
    float* const target = map + piece.first * map_.query;
    if (map_.query == 1) {
      kernels().multiply(
          {data_.get(), line_, 1, weights, 0, map_.dim, count, piece.count, target, map_.channel, false, start});
    } else {
      kernels().multiply({weights, 1, panel, data_.get(), ptrdiff_t(count) * panel, piece.count, count, map_.dim,
                          target, map_.query, false, nullptr});
    }
  }

 private:
  const Map map_;
  const ptrdiff_t line_;
  const Buffer<float> data_;
};

float log_threshold(const AttentionOptions& options) {
  return options.threshold > 0 ? float(std::log(options.threshold)) : -std::numeric_limits<float>::infinity();
}

bool keeps(const float* weights, int most, const AttentionShape& shape) { return weights && most <= shape.dim; }

// A query none of whose entries is allowed.
void fill(float* map, const float* start, const Map& place, int64_t queries, const Team& team) {
  if (place.query == 1) {
    for (int64_t k = team.begin(place.dim); k < team.end(place.dim); ++k) {
      std::fill_n(map + k * place.channel, queries, start ? start[k] : 0.0f);
    }
  } else {
    const int64_t begin = team.begin(queries), end = team.end(queries);
    std::fill_n(map + begin * place.dim, (end - begin) * place.dim, 0.0f);
  }
}

}  // namespace

void cross_image_attention_cpu(const float* query, const AttentionMemory& memory, float* out, float* entropy,
                               float* stats, float* weights, AttentionShape shape, const AttentionOptions& options,
                               int threads) {
  const Allowed allowed(memory.mask, shape);
  const int dim = int(shape.dim), most = allowed.most(), panel = kernels().panel;
  const double work = allowed.total() * double(shape.heads) * double(shape.queries) * dim;
  threads = worthwhile_threads(usable_threads(threads), work, kProductsPerThread);
  const bool keep = keeps(weights, most, shape);
  const ptrdiff_t size = ptrdiff_t(most) * panel;  // of a panel of scores
  const int64_t panels = parts(shape.queries, panel);
  const Map map(shape, shape.query_first), result(shape, shape.result_first);
  const Rows key_rows(memory.mask, most, dim);
  const Content content(result, out ? most : 0);
  const Buffer<float> features(size_t(threads) * dim * panel), scores(keep ? 0 : threads * size);
  const Buffer<float> biases(memory.key_bias ? most : 0);
  if (out) expect_writes(out, sizeof(float) * shape.batch * shape.heads * shape.queries * dim);
  if (keep) expect_writes(weights, sizeof(float) * shape.batch * shape.heads * panels * size);
  parallel(threads, [&](const Team& team) {
    float* const own = features.get() + ptrdiff_t(team.thread) * dim * panel;
    for (int64_t number = 0; number < shape.batch * shape.heads; ++number) {
      const Head head(shape, number);
      const int count = allowed.count(head.b);
      const int32_t* const entries = allowed.of(head.b);
      if (count == 0) {
        const int64_t begin = team.begin(shape.queries), length = team.end(shape.queries) - begin;
        if (out) fill(out + head.query, memory.out_bias, result, shape.queries, team);
        if (entropy) std::fill_n(entropy + head.stats + begin, length, 0.0f);
        std::fill_n(stats + (head.stats + begin) * kAttentionStats, length * kAttentionStats, 0.0f);
        continue;
      }
      team.barrier();  // what was packed is still read
      const float* const rows = key_rows.pack(memory.keys + head.memory, entries, count, team);
      if (out) content.pack(memory.values + head.memory, entries, count, team);
      if (memory.key_bias && team.thread == 0) {
        for (int m = 0; m < count; ++m) biases.get()[m] = memory.key_bias[entries[m]];
      }
      team.barrier();
      for_each_piece(team, 0, shape.queries, [&](const Piece& piece) {
        float* const p = (keep ? weights + (number * panels + piece.panel) * size : scores.get() + team.thread * size) +
                         piece.column;
        map.pack(query + head.query, piece, own);
        kernels().multiply(
            {rows, dim, 1, own, 0, count, dim, piece.count, p, panel, false, memory.key_bias ? biases.get() : nullptr});
        const int top = options.top_k < count ? int(options.top_k) : 0;
        kernels().attend({p, count, piece.count, options.scale, top, log_threshold(options),
                          stats + (head.stats + piece.first) * kAttentionStats,
                          entropy ? entropy + head.stats + piece.first : nullptr});
        if (out) content.mix(p, count, piece, out + head.query, memory.out_bias);
      });
    }
  });
}

void cross_image_attention_backward_cpu(const float* grad, const float* grad_entropy, const float* query,
                                        const AttentionMemory& memory, const float* stats, const float* weights,
                                        const AttentionGradients& gradients, AttentionShape shape, float scale,
                                        int threads) {
  const Allowed allowed(memory.mask, shape);
  const int dim = int(shape.dim), most = allowed.most(), panel = kernels().panel;
  const double work = allowed.total() * double(shape.heads) * double(shape.queries) * dim;
  threads = worthwhile_threads(usable_threads(threads), work, kProductsPerThread);
  const bool known = !grad_entropy && keeps(weights, most, shape), attended = memory.values != nullptr;
  const ptrdiff_t size = ptrdiff_t(most) * panel, line = parts(most, panel) * panel;
  const int64_t panels = parts(shape.queries, panel), steps = parts(panels, int64_t(kPanelsPerThread) * threads);
  const int64_t held = parts(panels, steps);
  const int sides = !gradients.keys ? 0 : attended ? 2 : 1;
  const Map map(shape, shape.query_first), grad_map(shape, shape.grad_first), result(shape, shape.result_first);
  const Rows key_rows(memory.mask, known ? 0 : most, dim), value_rows(memory.mask, attended ? most : 0, dim);
  const Content content(result, gradients.query ? most : 0);
  const Buffer<float> features(size_t(threads) * dim * panel), biases(memory.key_bias ? most : 0);
  // Scores and their gradients of as many queries as are held at a time, an entry a row; and turned, a query a row.
  const Buffer<float> scores(known ? 0 : held * size), changes(held * size);
  const Buffer<float> turned(size_t(sides) * held * panel * line), ones(gradients.key_bias ? held * panel : 0);
  // The gradients of an image's entries [sides, d, line], to which each thread adds for some of the channels.
  const Buffer<float> sums(size_t(sides) * dim * line), bias_sums(gradients.key_bias ? line : 0);
  const Buffer<float> columns(size_t(threads) * held * panel * panel);
  if (gradients.key_bias) std::fill_n(ones.get(), held * panel, 1.0f);
  if (gradients.query) expect_writes(gradients.query, sizeof(float) * shape.batch * shape.heads * shape.queries * dim);
  parallel(threads, [&](const Team& team) {
    float* const own = features.get() + ptrdiff_t(team.thread) * dim * panel;
    float* const column = columns.get() + ptrdiff_t(team.thread) * held * panel * panel;
    for (int64_t number = 0; number < shape.batch * shape.heads; ++number) {
      const Head head(shape, number);
      const int count = allowed.count(head.b);
      const int32_t* const entries = allowed.of(head.b);
      if (count == 0) {
        if (gradients.query) fill(gradients.query + head.query, nullptr, result, shape.queries, team);
        continue;
      }
      const float* const of_keys = known ? nullptr : key_rows.pack(memory.keys + head.memory, entries, count, team);
      const float* const of_values =
          attended ? value_rows.pack(memory.values + head.memory, entries, count, team) : nullptr;
      if (gradients.query) content.pack(memory.keys + head.memory, entries, count, team);
      if (memory.key_bias && team.thread == 0) {
        for (int m = 0; m < count; ++m) biases.get()[m] = memory.key_bias[entries[m]];
      }
      team.barrier();
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t first_panel = panels * step / steps, from = first_panel * panel;
        const int64_t to = std::min(shape.queries, panels * (step + 1) / steps * panel), length = to - from;
        for_each_piece(team, from, to, [&](const Piece& piece) {
          const ptrdiff_t place = (piece.panel - first_panel) * size + piece.column;
          // Known weights are only read.
          float* const p = known ? const_cast<float*>(weights) + (number * panels + piece.panel) * size + piece.column
                                 : scores.get() + place;
          float* const change = changes.get() + place;
          if (!known) {
            map.pack(query + head.query, piece, own);
            kernels().multiply({of_keys, dim, 1, own, 0, count, dim, piece.count, p, panel, false,
                                memory.key_bias ? biases.get() : nullptr});
          }
          if (attended) {
            grad_map.pack(grad + head.query, piece, own);
            kernels().multiply({of_values, dim, 1, own, 0, count, dim, piece.count, change, panel, false, nullptr});
          }
          kernels().differentiate({p, change, count, piece.count, scale,
                                   stats + (head.stats + piece.first) * kAttentionStats,
                                   grad_entropy ? grad_entropy + head.stats + piece.first : nullptr, attended, known});
          if (gradients.query) content.mix(change, count, piece, gradients.query + head.query, nullptr);
          for (int side = 0; side < sides; ++side) {
            float* const to = turned.get() + side * held * panel * line + (piece.first - from) * panel;
            kernels().pack_rows(side ? p : change, panel, nullptr, piece.count, count, to, panel, length * panel);
          }
        });
        team.barrier();
        const int chunks = int(parts(dim, panel));
        for (int unit = int(team.begin(sides * chunks)); unit < int(team.end(sides * chunks)); ++unit) {
          const int side = unit / chunks, first = unit % chunks * panel, width = std::min(panel, dim - first);
          const Map& place = side ? grad_map : map;
          const float* left = (side ? grad : query) + head.query + from * place.query + first * place.channel;
          const bool as_it_lies = place.query == 1;
          if (!as_it_lies) {
            kernels().pack(left, place.query, nullptr, int(length), width, column);
            left = column;
          }
          kernels().multiply({left, as_it_lies ? place.channel : 1, as_it_lies ? 1 : panel,
                              turned.get() + side * held * panel * line, length * panel, width, int(length), count,
                              sums.get() + (ptrdiff_t(side) * dim + first) * line, line, step > 0, nullptr});
        }
        if (gradients.key_bias && team.thread == team.threads - 1) {
          kernels().multiply({ones.get(), 0, 1, turned.get(), length * panel, 1, int(length), count, bias_sums.get(),
                              line, step > 0, nullptr});
        }
        team.barrier();
      }
      const int chunks = int(parts(dim, panel));
      for (int unit = int(team.begin(sides * chunks)); unit < int(team.end(sides * chunks)); ++unit) {
        const int side = unit / chunks, first = unit % chunks * panel, width = std::min(panel, dim - first);
        kernels().add_transposed(sums.get() + (ptrdiff_t(side) * dim + first) * line, line, width, count, entries,
                                 (side ? gradients.values : gradients.keys) + head.memory + first, dim);
      }
      if (gradients.key_bias && team.thread == team.threads - 1) {
        for (int m = 0; m < count; ++m) gradients.key_bias[entries[m]] += bias_sums.get()[m];
      }
    }
  });
}

}  // namespace wsss
