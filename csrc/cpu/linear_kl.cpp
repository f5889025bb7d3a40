// linear_kl: the divergence between two softmaxes over a vocabulary and its gradient for the hidden states of one of them.
//
// Floor: three products of tokens x vocabulary x features multiply-adds: the logits of both sides, and the gradient. The logits are
// stored only for a few tokens at a time, as many as fit kLogitFloats, so that memory depends neither on the vocabulary nor on the
// tokens. Both operands of each product are panels; packing the head again for each group of tokens is the price, a few percent.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "cpu/activation.h"
#include "cpu/finite.h"
#include "cpu/kernels.h"
#include "cpu/panel_matrix.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kLogitFloats = int64_t{1} << 24;  // 64 MiB for the logits of both sides
constexpr int64_t kMostTokens = 8 * kTilePanels * kLanes;
constexpr int64_t kTileWords = 64;      // rows of the head that a task multiplies
constexpr int64_t kTileFeatures = 192;  // columns of the head that are packed at a time for the gradient
constexpr int64_t kSplits = 8;          // parts of the vocabulary whose gradients are summed separately, for any number of threads
constexpr int64_t kRunWords = 256;      // words summed in float before they are added to a double

int64_t tokens_at_once(int64_t tokens, int64_t vocabulary) {
  const int64_t fitting = kLogitFloats / (2 * std::max<int64_t>(vocabulary, 1));
  const int64_t whole = std::max(fitting / kLanes, int64_t{1}) * kLanes;
  return std::min({tokens, whole, kMostTokens});
}

// Hidden states, logits and head of one side, for the tokens of one group.
struct Side {
  Logits in;
  PanelMatrix x, logits;

  Side(const Logits& in_, int64_t tokens, int64_t vocabulary) : in(in_), x(tokens, in_.features), logits(tokens, vocabulary) {}

  void load(int64_t first, int64_t tokens, const Executor& executor) {
    x.rows = logits.rows = tokens;
    dispatch_dtype(in.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* rows = static_cast<const T*>(in.x) + first * in.features;
      parallel_for(executor, x.panels(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          to_panel(rows + p * kLanes * in.features, x.rows_of(p), in.features, in.features, x.at(p, 0), [](T value) {
            return to_float(value);
          });
        }
      });
    });
  }
};

// Packs rows [first, first + words) of the head as the right-hand operand of the logits.
void pack_words(const Logits& in, int64_t first, int64_t words, const Multiplier& out) {
  dispatch_dtype(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t j = 0; j < words; j += kLanes) {
      const T* rows = static_cast<const T*>(in.head) + (first + j) * in.features;
      to_panel(rows, std::min(kLanes, words - j), in.features, in.features, out.panel(j), [](T value) { return to_float(value); });
    }
  });
}

// Packs a rectangle of the head as the right-hand operand of the gradient.
void pack_features(const Logits& in, int64_t first, int64_t words, int64_t feature, int64_t features, const Multiplier& out) {
  dispatch_dtype(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t k = 0; k < words; ++k) {
      const T* row = static_cast<const T*>(in.head) + (first + k) * in.features + feature;
      for (int64_t j = 0; j < features; j += kLanes) {
        float* place = out.panel(j) + k * kLanes;
        const int64_t lanes = std::min(kLanes, features - j);
        for (int64_t lane = 0; lane < lanes; ++lane) place[lane] = to_float(row[j + lane]);
        std::fill(place + lanes, place + kLanes, 0.0f);
      }
    }
  });
}

void multiply_words(const Multiplier& head, MultiplyAdd multiply, const Side& side, int64_t first, int64_t words, float scale) {
  for (int64_t panel = 0; panel < side.x.panels(); panel += kTilePanels) {
    const int64_t panels = std::min(kTilePanels, side.x.panels() - panel);
    for (int64_t p = panel; p < panel + panels; ++p) std::fill_n(side.logits.at(p, first), words * kLanes, 0.0f);
    multiply(
        head, side.in.features, words, scale, side.x.at(panel, 0), side.x.stride(), side.logits.at(panel, first),
        side.logits.stride(), panels);
  }
}

void make_logits(Side& student, Side& teacher, float scale, const Executor& executor) {
  const int64_t vocabulary = student.logits.columns;
  const bool one_head = student.in.head == teacher.in.head;
  const MultiplyAdd multiply = choose_multiply_add();
  const int64_t features = std::max(student.in.features, teacher.in.features);
  parallel_tasks(
      executor, ceil_div(vocabulary, kTileWords), [&] { return Multiplier(features, kTileWords); },
      [&](int64_t tile, Multiplier& head) {
        const int64_t first = tile * kTileWords, words = std::min(kTileWords, vocabulary - first);
        for (Side* side : {&student, &teacher}) {
          head.units = side->in.features;
          if (side == &student || !one_head) pack_words(side->in, first, words, head);
          multiply_words(head, multiply, *side, first, words, scale);
        }
      });
}

// Largest logit of each token of a panel.
SPARSEKERN_INLINE void find_largest(const float* logits, int64_t words, float* largest) {
  for (int64_t lane = 0; lane < kLanes; ++lane) largest[lane] = logits[lane];
  for (int64_t j = 1; j < words; ++j) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = logits[j * kLanes + lane];
      largest[lane] = select(value > largest[lane], value, largest[lane]);
    }
  }
}

// Replaces logits by exponentials, and adds what the divergence needs of up to kRunWords words.
SPARSEKERN_INLINE void exponentiate_run(
    float* student, float* teacher, int64_t words, const float* student_largest, const float* teacher_largest, double* student_sum,
    double* teacher_sum, double* difference) {
  float s_sum[kLanes] = {}, t_sum[kLanes] = {}, weighted[kLanes] = {};
  for (int64_t j = 0; j < words; ++j) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float s = student[j * kLanes + lane] - student_largest[lane], t = teacher[j * kLanes + lane] - teacher_largest[lane];
      const float of_student = exp_of(s), of_teacher = exp_of(t);
      student[j * kLanes + lane] = of_student;
      teacher[j * kLanes + lane] = of_teacher;
      s_sum[lane] += of_student;
      t_sum[lane] += of_teacher;
      weighted[lane] += of_teacher * (t - s);
    }
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    student_sum[lane] += s_sum[lane];
    teacher_sum[lane] += t_sum[lane];
    difference[lane] += weighted[lane];
  }
}

// student[j] = student[j] * student_scale - teacher[j] * teacher_scale, token by token: the gradient for the logits.
SPARSEKERN_INLINE void subtract_shares(
    float* student, const float* teacher, int64_t words, const float* student_scale, const float* teacher_scale) {
  for (int64_t j = 0; j < words; ++j) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t i = j * kLanes + lane;
      student[i] = student[i] * student_scale[lane] - teacher[i] * teacher_scale[lane];
    }
  }
}

// Turns the student's logits into the gradient for them, and writes the divergence of each token.
void compare(Side& student, Side& teacher, float* kl, const Executor& executor) {
  const int64_t words = student.logits.columns;
  const auto largest_of = Entries<&find_largest>::choose();
  const auto exponentiate = Entries<&exponentiate_run>::choose();
  const auto subtract = Entries<&subtract_shares>::choose();
  parallel_tasks(executor, student.logits.panels(), [&](int64_t panel) {
    float *s = student.logits.at(panel, 0), *t = teacher.logits.at(panel, 0);
    float s_largest[kLanes], t_largest[kLanes], s_scale[kLanes], t_scale[kLanes];
    double s_sum[kLanes] = {}, t_sum[kLanes] = {}, difference[kLanes] = {};
    largest_of(s, words, s_largest);
    largest_of(t, words, t_largest);
    for (int64_t j = 0; j < words; j += kRunWords) {
      const int64_t count = std::min(kRunWords, words - j);
      exponentiate(s + j * kLanes, t + j * kLanes, count, s_largest, t_largest, s_sum, t_sum, difference);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      s_scale[lane] = static_cast<float>(1 / s_sum[lane]);
      t_scale[lane] = static_cast<float>(1 / t_sum[lane]);
    }
    for (int64_t lane = 0; lane < student.logits.rows_of(panel); ++lane) {
      kl[panel * kLanes + lane] = static_cast<float>(difference[lane] / t_sum[lane] + std::log(s_sum[lane] / t_sum[lane]));
    }
    subtract(s, t, words, s_scale, t_scale);
  });
}

// Multiplies the gradient for the logits by the head, a part of the vocabulary at a time.
class Gradient {
 public:
  Gradient(const Logits& in, int64_t tokens, int64_t vocabulary) : in_(in), vocabulary_(vocabulary) {
    for (int64_t split = 0; split < kSplits; ++split) parts_.emplace_back(tokens, in.features);
  }

  void multiply(const PanelMatrix& logits, float scale, float* grad, const Executor& executor) {
    const int64_t chunks = ceil_div(vocabulary_, kProductUnits);
    const MultiplyAdd multiply = choose_multiply_add();
    const int64_t width = std::min(kTileFeatures, round_up(in_.features, kLanes));
    parallel_tasks(
        executor, kSplits, [&] { return Multiplier(kProductUnits, width); },
        [&](int64_t split, Multiplier& head) {
          PanelMatrix& part = parts_[static_cast<size_t>(split)];
          part.rows = logits.rows;
          std::fill_n(part.data.get(), part.panels() * part.stride(), 0.0f);
          for (int64_t chunk = chunks * split / kSplits; chunk < chunks * (split + 1) / kSplits; ++chunk) {
            add_words(logits, chunk * kProductUnits, multiply, scale, head, part);
          }
        });
    parallel_for(executor, logits.panels(), 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) add_parts(p, grad + p * kLanes * in_.features);
    });
  }

 private:
  void add_words(
      const PanelMatrix& logits, int64_t first, MultiplyAdd multiply, float scale, Multiplier& head, PanelMatrix& part) const {
    const int64_t words = std::min(kProductUnits, vocabulary_ - first);
    for (int64_t feature = 0; feature < in_.features; feature += kTileFeatures) {
      const int64_t features = std::min(kTileFeatures, in_.features - feature);
      pack_features(in_, first, words, feature, features, head);
      for (int64_t panel = 0; panel < logits.panels(); panel += kTilePanels) {
        multiply(
            head, words, features, scale, logits.at(panel, first), logits.stride(), part.at(panel, feature), part.stride(),
            std::min(kTilePanels, logits.panels() - panel));
      }
    }
  }

  void add_parts(int64_t panel, float* grad) {
    float* sum = parts_[0].at(panel, 0);
    for (int64_t split = 1; split < kSplits; ++split) {
      const float* other = parts_[static_cast<size_t>(split)].at(panel, 0);
      for (int64_t i = 0; i < in_.features * kLanes; ++i) sum[i] += other[i];
    }
    from_panel(sum, parts_[0].rows_of(panel), in_.features, grad, in_.features, [](float value) { return value; });
  }

  Logits in_;
  int64_t vocabulary_;
  std::vector<PanelMatrix> parts_;
};

// Names what made a divergence NaN or Inf.
[[noreturn]] void refuse(
    const Logits& student, const Logits& teacher, int64_t tokens, int64_t vocabulary, const Executor& executor) {
  require_finite("x", student.x, student.dtype, tokens, student.features, nullptr, executor);
  require_finite("head", student.head, student.dtype, vocabulary, student.features, nullptr, executor);
  require_finite("teacher_x", teacher.x, teacher.dtype, tokens, teacher.features, nullptr, executor);
  require_finite("teacher_head", teacher.head, teacher.dtype, vocabulary, teacher.features, nullptr, executor);
  throw std::invalid_argument("x, teacher_x: expected logits that float32 can hold, got an overflow");
}

}  // namespace

void linear_kl(
    const Logits& student, const Logits& teacher, int64_t tokens, int64_t vocabulary, double temperature, float* kl, float* grad,
    const Executor& executor) {
  if (tokens == 0) return;
  const int64_t group = tokens_at_once(tokens, vocabulary);
  const auto scale = static_cast<float>(1 / temperature);
  Side of_student(student, group, vocabulary), of_teacher(teacher, group, vocabulary);
  Gradient gradient(student, group, vocabulary);
  for (int64_t first = 0; first < tokens; first += group) {
    const int64_t count = std::min(group, tokens - first);
    of_student.load(first, count, executor);
    of_teacher.load(first, count, executor);
    make_logits(of_student, of_teacher, scale, executor);
    compare(of_student, of_teacher, kl + first, executor);
    gradient.multiply(of_student.logits, scale, grad + first * student.features, executor);
  }
  if (!std::all_of(kl, kl + tokens, [](float value) { return std::isfinite(value); })) {
    refuse(student, teacher, tokens, vocabulary, executor);
  }
}

}  // namespace sparsekern::cpu
