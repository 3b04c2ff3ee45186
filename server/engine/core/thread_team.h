// A persistent team of threads for the ops inside a step. The caller is one of its members.
//
// Work is claimed in chunks from one atomic counter, so a member that the operating system has taken off its core
// (the event loop shares the machine) does not hold up the others for more than its current chunk. Between ops
// the members spin for a bounded time, then sleep on a futex.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace sterna {

class ThreadTeam {
 public:
  explicit ThreadTeam(int num_threads);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls f(chunk, member) for every chunk in [0, chunks) and returns when all are done. Members take chunks in
  // ascending order and end what they took before they take more: so a chunk may wait for one with a smaller number.
  template <class F>
  void run(int chunks, F&& f) {
    if (chunks <= 1 || threads_.empty()) {
      for (int i = 0; i < chunks; ++i) f(i, 0);
      return;
    }
    if (chunks <= kMaxClaims) return run_claims(chunks, f);
    const int each = (chunks - 1) / kMaxClaims + 1;
    run_claims((chunks - 1) / each + 1, [&](int claim, int member) {
      const int begin = claim * each, count = std::min(each, chunks - begin);
      for (int i = 0; i < count; ++i) f(begin + i, member);
    });
  }

  // Returns when `left` is zero: work that others hold. A member that lost its core needs it back: yield after a while.
  static void wait_for(const std::atomic<int32_t>& left);

 private:
  using Function = void (*)(void*, int, int);
  static constexpr int kMaxClaims = 0xffff;  // what the ticket has bits for
  template <class F>
  void run_claims(int chunks, F&& f) {
    using Callable = std::remove_reference_t<F>;
    run_job(chunks, [](void* p, int chunk, int member) { (*static_cast<Callable*>(p))(chunk, member); },
            const_cast<void*>(static_cast<const void*>(&f)));
  }
  void run_job(int chunks, Function function, void* argument);
  void work(int member);
  bool claim(uint64_t ticket, int member);

  // The fields of the current job. They change only while no chunk of it is left, and a member uses what it read
  // only if it then wins a chunk with the ticket it read before: so relaxed atomics suffice.
  std::atomic<Function> function_{nullptr};
  std::atomic<void*> argument_{nullptr};
  // epoch (32 bits) | chunks (16) | next chunk (16)
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int32_t> unfinished_{0};
  alignas(64) std::atomic<uint32_t> sleepers_{0};
  std::atomic<uint32_t> wake_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

}  // namespace sterna
