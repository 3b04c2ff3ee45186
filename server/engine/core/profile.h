// Where a step's time goes: wall time between laps, on the thread that drives the step. Off, a lap is one branch.
#pragma once

#include <array>
#include <chrono>

namespace sterna {

// An op's time ends with the slowest member of the team, so barriers and imbalance are in it.
enum class Op { Embed, Norm, Qkv, Rope, Attention, Out, GateUp, Activation, Down, Head, Lora, Sample, kCount };
inline constexpr const char* kOpNames[] = {"embed", "norm",       "qkv",  "rope", "attention", "out",
                                           "gate_up", "activation", "down", "head", "lora",      "sample"};

class Profile {
 public:
  using Seconds = std::array<double, static_cast<size_t>(Op::kCount)>;

  // What has been gathered; begins anew, or stops.
  Seconds restart(bool is_on) {
    const Seconds gathered = seconds_;
    seconds_ = {};
    is_on_ = is_on;
    return gathered;
  }
  void begin() {
    if (is_on_) last_ = Clock::now();
  }
  void lap(Op op) {
    if (!is_on_) return;
    const Clock::time_point now = Clock::now();
    seconds_[static_cast<size_t>(op)] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  bool is_on_ = false;
  Clock::time_point last_;
  Seconds seconds_ = {};
};

}  // namespace sterna
