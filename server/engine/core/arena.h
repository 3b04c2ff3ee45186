// Memory for weights and KV cache: reserved in large mappings (huge pages where the system gives them), so that
// resident memory grows only with what is touched, and given back all at once.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace sterna {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    for (const auto& s : slabs_) munmap(s.base, s.size);
  }

  // 64-byte aligned, zero-filled on first touch. Throws std::bad_alloc.
  void* allocate(size_t bytes) {
    bytes = (bytes + 63) & ~size_t{63};
    if (slabs_.empty() || slabs_.back().used + bytes > slabs_.back().size) add_slab(bytes);
    Slab& s = slabs_.back();
    void* p = static_cast<char*>(s.base) + s.used;
    s.used += bytes;
    return p;
  }
  template <class T>
  T* allocate_array(size_t count) { return static_cast<T*>(allocate(count * sizeof(T))); }

 private:
  struct Slab { void* base; size_t size, used; };
  static constexpr size_t kSlab = size_t{256} << 20;  // address space, not memory

  void add_slab(size_t bytes) {
    const size_t size = bytes > kSlab ? (bytes + 4095) & ~size_t{4095} : kSlab;
    void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    madvise(base, size, MADV_HUGEPAGE);  // advice: without it the kernel gives small pages, nothing else changes
    slabs_.push_back({base, size, 0});
  }
  std::vector<Slab> slabs_;
};

}  // namespace sterna
