// Search shared by plain_split and gated_split: the best pre-activation of each entry.
//
// An entry minimises `ratio * fit(t) + (s - gate)^2` over s, where t = act(s) and
//   plain:  fit(t) = (p - t)^2
//   gated:  fit(t) = (p - t up)^2 / (1 + ratio t^2). This is `(p - t z)^2 + (z - up)^2 / ratio` at its best z = (up + ratio t p) /
//   (1 + ratio t^2), so that z and s are found together.
// The objective is not convex. The best of a few starting points, the old value among them, is improved by Gauss-Newton steps,
// whose curvature is at least 1. A step is taken only if it lowers the objective; after each other step the length is quartered.
// The objective never rises.
#pragma once

#include <algorithm>

#include "common/dtype.h"
#include "cpu/activation.h"
#include "cpu/dispatch.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace sparsekern::cpu::split {

// The inputs of the entries; `up` is null in the plain form.
template <class T>
struct Inputs {
  const T* p;
  const T* up;
  const T* gate;
  const T* start;
};

template <class T>
struct Outputs {
  T* z;  // null in the plain form
  T* s;
};

constexpr int64_t kGrain = 1 << 12;
constexpr int64_t kLanes = 64;                           // entries processed at a time: their state stays in L1
constexpr float kStarts[] = {-1.25f, 0.0f, 1.0f, 3.0f};  // near the minimum, at zero, and where the slope is about one

struct Fit {
  float value;
  float gradient;   // derivative of half the fit with respect to t
  float curvature;  // Gauss-Newton approximation of its second derivative
};

// Derivatives with respect to t, without the common factor `ratio`.
template <bool kGated>
SPARSEKERN_INLINE Fit fit_of(float t, float p, float up, float ratio) {
  if constexpr (kGated) {
    const float scale = 1.0f / (1.0f + ratio * t * t);
    const float miss = p - t * up;
    const float z = (up + ratio * t * p) * scale;
    return {miss * miss * scale, -miss * scale * z, z * z * scale};
  } else {
    return {(p - t) * (p - t), t - p, 1.0f};
  }
}

template <bool kGated, Activation kActivation, class T>
SPARSEKERN_INLINE void split_lanes(const Inputs<T>& in, const Outputs<T>& out, int64_t count, float ratio, int64_t steps) {
  float p[kLanes] = {}, up[kLanes] = {}, gate[kLanes] = {}, s[kLanes] = {};
  float t[kLanes], slope[kLanes], objective[kLanes], length[kLanes];
  for (int64_t i = 0; i < count; ++i) p[i] = to_float(in.p[i]);
  for (int64_t i = 0; i < count; ++i) gate[i] = to_float(in.gate[i]);
  for (int64_t i = 0; i < count; ++i) s[i] = to_float(in.start[i]);
  if constexpr (kGated) {
    for (int64_t i = 0; i < count; ++i) up[i] = to_float(in.up[i]);
  }
  for (int64_t i = 0; i < kLanes; ++i) {
    const Activated here = activate<kActivation>(s[i]);
    t[i] = here.value;
    slope[i] = here.slope;
    objective[i] = ratio * fit_of<kGated>(here.value, p[i], up[i], ratio).value + (s[i] - gate[i]) * (s[i] - gate[i]);
    length[i] = 1.0f;
  }
  // Each entry has two starting points of its own: its target, and the value that fits p without a change of up (act(s) is about s
  // there).
  for (int64_t i = 0; i < kLanes; ++i) {
    float wanted = p[i];
    if constexpr (kGated) wanted = p[i] / up[i];
    wanted = select(wanted > 0.0f, wanted, 0.0f);  // 0 / 0 is NaN, which is not above 0
    const Activated at_gate = activate<kActivation>(gate[i]), at_wanted = activate<kActivation>(wanted);
    const float gate_objective = ratio * fit_of<kGated>(at_gate.value, p[i], up[i], ratio).value;
    const float wanted_objective =
        ratio * fit_of<kGated>(at_wanted.value, p[i], up[i], ratio).value + (wanted - gate[i]) * (wanted - gate[i]);
    const bool first = gate_objective < objective[i];
    const float best = select(first, gate_objective, objective[i]);
    const bool second = wanted_objective < best;
    s[i] = select(second, wanted, select(first, gate[i], s[i]));
    t[i] = select(second, at_wanted.value, select(first, at_gate.value, t[i]));
    slope[i] = select(second, at_wanted.slope, select(first, at_gate.slope, slope[i]));
    objective[i] = select(second, wanted_objective, best);
  }
  for (const float place : kStarts) {
    const Activated there = activate<kActivation>(place);
    for (int64_t i = 0; i < kLanes; ++i) {
      const float value = ratio * fit_of<kGated>(there.value, p[i], up[i], ratio).value + (place - gate[i]) * (place - gate[i]);
      const bool better = value < objective[i];
      s[i] = select(better, place, s[i]);
      t[i] = select(better, there.value, t[i]);
      slope[i] = select(better, there.slope, slope[i]);
      objective[i] = select(better, value, objective[i]);
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const Fit fit = fit_of<kGated>(t[i], p[i], up[i], ratio);
      const float gradient = s[i] - gate[i] + ratio * fit.gradient * slope[i];
      const float curvature = 1.0f + ratio * fit.curvature * slope[i] * slope[i];
      const float place = s[i] - length[i] * gradient / curvature;
      const Activated there = activate<kActivation>(place);
      const float value = ratio * fit_of<kGated>(there.value, p[i], up[i], ratio).value + (place - gate[i]) * (place - gate[i]);
      const bool better = value < objective[i];
      s[i] = select(better, place, s[i]);
      t[i] = select(better, there.value, t[i]);
      slope[i] = select(better, there.slope, slope[i]);
      objective[i] = select(better, value, objective[i]);
      const float longer = select(length[i] < 0.5f, 2.0f * length[i], 1.0f);
      length[i] = select(better, longer, 0.25f * length[i]);
    }
  }
  for (int64_t i = 0; i < kLanes; ++i) s[i] = select(objective[i] == objective[i], s[i], objective[i]);  // NaN if any input was
  if constexpr (kGated) {
    for (int64_t i = 0; i < count; ++i) out.z[i] = from_float<T>((up[i] + ratio * t[i] * p[i]) / (1.0f + ratio * t[i] * t[i]));
  }
  for (int64_t i = 0; i < count; ++i) out.s[i] = from_float<T>(s[i]);
}

// Searches the entries [begin, end).
template <bool kGated, Activation kActivation, class T>
SPARSEKERN_INLINE void split_range(Inputs<T> in, Outputs<T> out, int64_t begin, int64_t end, float ratio, int64_t steps) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const Inputs<T> here{in.p + i, kGated ? in.up + i : nullptr, in.gate + i, in.start + i};
    const Outputs<T> there{kGated ? out.z + i : nullptr, out.s + i};
    split_lanes<kGated, kActivation>(here, there, std::min(kLanes, end - i), ratio, steps);
  }
}

// Searches all entries with the range function of the current ISA.
template <auto kRange, class T>
void run(const SplitProblem& problem, const Outputs<T>& out, const Executor& executor) {
  const auto entry = Entries<kRange>::choose();
  const Inputs<T> in{
      static_cast<const T*>(problem.activated), static_cast<const T*>(problem.up), static_cast<const T*>(problem.gate),
      static_cast<const T*>(problem.start)};
  parallel_for(executor, problem.entries, kGrain, [&](int64_t begin, int64_t end) {
    entry(in, out, begin, end, problem.ratio, problem.steps);
  });
}

}  // namespace sparsekern::cpu::split
