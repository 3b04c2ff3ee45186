// Claiming of chunks, bounded spinning, sleeping and waking.
#include "thread_team.h"

#include <cassert>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sterna {
namespace {

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// About 40 us of pauses on the machine that this was tuned on: longer than any gap between two ops of a step,
// far shorter than a step, so that an idle server burns nothing and the event loop gets the core.
constexpr int kSpins = 1000;

}  // namespace

ThreadTeam::ThreadTeam(int num_threads) {
  threads_.reserve(static_cast<size_t>(num_threads > 1 ? num_threads - 1 : 0));
  for (int member = 1; member < num_threads; ++member) threads_.emplace_back([this, member] { work(member); });
}

ThreadTeam::~ThreadTeam() {
  stop_.store(true);
  wake_.fetch_add(1);
  wake_.notify_all();
  for (auto& t : threads_) t.join();
}

bool ThreadTeam::claim(uint64_t ticket, int member) {
  bool any = false;
  for (;;) {
    const uint32_t next = ticket & 0xffff, chunks = (ticket >> 16) & 0xffff;
    if (next >= chunks) return any;
    const Function function = function_.load(std::memory_order_relaxed);
    void* const argument = argument_.load(std::memory_order_relaxed);
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      continue;
    }
    function(argument, static_cast<int>(next), member);
    any = true;
    unfinished_.fetch_sub(1, std::memory_order_release);
    ticket = ticket_.load(std::memory_order_acquire);
  }
}

void ThreadTeam::run_job(int chunks, Function function, void* argument) {
  assert(chunks <= kMaxClaims);
  function_.store(function, std::memory_order_relaxed);
  argument_.store(argument, std::memory_order_relaxed);
  unfinished_.store(chunks, std::memory_order_relaxed);
  const uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  const uint64_t ticket = (epoch << 32) | (static_cast<uint64_t>(chunks) << 16);
  ticket_.store(ticket, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst)) {
    wake_.fetch_add(1, std::memory_order_seq_cst);
    wake_.notify_all();
  }
  claim(ticket, 0);
  wait_for(unfinished_);
}

void ThreadTeam::wait_for(const std::atomic<int32_t>& left) {
  for (int spins = 0; left.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpins) pause_cpu();
    else std::this_thread::yield();
  }
}

void ThreadTeam::work(int member) {
  int spins = 0;
  while (!stop_.load(std::memory_order_relaxed)) {
    if (claim(ticket_.load(std::memory_order_acquire), member)) {
      spins = 0;
      continue;
    }
    if (++spins < kSpins) {
      pause_cpu();
      continue;
    }
    const uint32_t seen = wake_.load(std::memory_order_seq_cst);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    const uint64_t ticket = ticket_.load(std::memory_order_seq_cst);
    if ((ticket & 0xffff) >= ((ticket >> 16) & 0xffff) && !stop_.load()) wake_.wait(seen);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    spins = 0;
  }
}

}  // namespace sterna
