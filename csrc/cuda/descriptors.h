// Laying out plain arrays one after the other, for a copy on the device.
#pragma once

#include <cstring>
#include <vector>

#include "kfac/device.h"

namespace kfac {

// Appends an array on a multiple of 16 bytes; returns where it begins.
template <class T>
int64_t append(std::vector<char>& bytes, const std::vector<T>& values) {
  const int64_t at = align_up<int64_t>(int64_t(bytes.size()), 16);
  bytes.resize(at + values.size() * sizeof(T));
  if (!values.empty()) memcpy(bytes.data() + at, values.data(), values.size() * sizeof(T));
  return at;
}

}  // namespace kfac
