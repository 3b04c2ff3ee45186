// Where a step's time goes: time between laps on the thread that drives the step. Off, a lap is one branch.
#pragma once

#include <time.h>

#include <array>
#include <cstddef>

namespace sterna {

// An op's time ends with the slowest member of the team, so barriers and imbalance are in it.
// Lora: of float models alone. Beside a quantized matrix the adapters' part is in that matrix's op.
enum class Op { Embed, Norm, Qkv, Rope, Attention, Out, GateUp, Activation, Down, Head, Lora, Sample, kCount };
inline constexpr const char* kOpNames[] = {"embed", "norm",       "qkv",  "rope", "attention", "out",
                                           "gate_up", "activation", "down", "head", "lora",      "sample"};

class Profile {
 public:
  using Seconds = std::array<double, static_cast<size_t>(Op::kCount)>;

  // What has been gathered; begins anew, or stops. The thread's own clock is for a core with one thread on a machine that
  // does other things too.
  Seconds restart(bool is_on, bool own_clock) {
    const Seconds gathered = seconds_;
    seconds_ = {};
    is_on_ = is_on;
    clock_ = own_clock ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
    return gathered;
  }
  void begin() {
    if (is_on_) last_ = now();
  }
  void lap(Op op) {
    if (!is_on_) return;
    const double time = now();
    seconds_[static_cast<size_t>(op)] += time - last_;
    last_ = time;
  }

 private:
  double now() const {
    timespec t;
    clock_gettime(clock_, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  }

  bool is_on_ = false;
  clockid_t clock_ = CLOCK_MONOTONIC;
  double last_ = 0;
  Seconds seconds_ = {};
};

}  // namespace sterna
