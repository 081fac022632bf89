// Memory of a step.
#pragma once

#include <cstdint>

namespace torchrelay {

// Cuts memory of a step into buffers, each on its own cache lines.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    char* start = memory_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;
    return memory_ ? reinterpret_cast<T*>(start) : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace torchrelay
