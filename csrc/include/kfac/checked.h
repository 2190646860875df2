// Integers whose overflow is an error, and the limits of what kernels take.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

namespace kfac {

// A buffer whose size cannot be counted, let alone be had.
class TooMuchMemory : public std::bad_alloc {
 public:
  const char* what() const noexcept override { return "more memory than can be addressed"; }
};

// Sizes of memory: sums and products that do not fit throw TooMuchMemory.
class Checked {
 public:
  constexpr Checked(int64_t value) : value_(value) {}
  constexpr int64_t value() const { return value_; }

  friend Checked operator+(Checked a, Checked b) {
    if (__builtin_add_overflow(a.value_, b.value_, &a.value_)) throw TooMuchMemory();
    return a;
  }
  friend Checked operator*(Checked a, Checked b) {
    if (__builtin_mul_overflow(a.value_, b.value_, &a.value_)) throw TooMuchMemory();
    return a;
  }

 private:
  int64_t value_;
};

// As many as can be elements of T in memory.
template <class T>
size_t elements(Checked count) {
  return static_cast<size_t>((count * int64_t(sizeof(T))).value()) / sizeof(T);
}

// Along an axis of an image, padding and the reach of the kernel included: sums of a few never overflow.
constexpr int64_t kMaxExtent = int64_t(1) << 40;
// Rows or numbers of all samples: counts that are exact in double.
constexpr int64_t kMaxCount = int64_t(1) << 53;
// Rows of a matrix: its bytes and those of a few copies can be counted.
constexpr int64_t kMaxRows = int64_t(1) << 28;

inline void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return;
  throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", expected " +
                              std::to_string(least) + " to " + std::to_string(most));
}

// Raises unless the product of factors >= 1 is at most `most`.
template <size_t N>
void check_product(const char* name, const int64_t (&factors)[N], int64_t most) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product) || product > most) {
      throw std::invalid_argument(std::string(name) + " are more than " + std::to_string(most));
    }
  }
}

// A matrix [rows, columns] whose rows lie `stride` elements apart, one after the other.
inline void check_matrix(const char* name, int64_t rows, int64_t columns, int64_t stride) {
  const bool fits = rows >= 1 && rows <= kMaxRows && columns >= 1 && columns <= kMaxRows;
  if (fits && (rows == 1 || (stride >= columns && stride <= kMaxCount))) return;
  throw std::invalid_argument(std::string(name) + " has " + std::to_string(rows) + " rows and " +
                              std::to_string(columns) + " columns, " + std::to_string(stride) +
                              " apart, expected 1 to " + std::to_string(kMaxRows) + ", one row after the other");
}

// Raises if bytes [a, a + a_size) and [b, b + b_size) meet: a kernel reads one while it writes the other.
inline void check_apart(const char* what, const void* a, int64_t a_size, const void* b, int64_t b_size) {
  const auto first = reinterpret_cast<uintptr_t>(a), second = reinterpret_cast<uintptr_t>(b);
  if (first < second + uintptr_t(b_size) && second < first + uintptr_t(a_size)) {
    throw std::invalid_argument(std::string(what) + " share memory");
  }
}

}  // namespace kfac
