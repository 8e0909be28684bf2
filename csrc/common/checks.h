// Checks of what a compiled op is given, before a kernel follows a pointer. Each op's checks.h says
// what its arguments must be, in one function an op, and its registration.cpp calls that first, in
// every library alike.
//
// A check reads a tensor's head and compares integers: no memory is taken and no text is made
// unless it fails. A failure is a RuntimeError in Python that names the argument.
#pragma once

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/tensors.h"

namespace common {

constexpr int64_t kAny = -1;   // a size in `shape` that may be any number
constexpr int64_t kSome = -2;   // one that is at least 1
constexpr int64_t kMostElements = int64_t{1} << 48;

// Some dtypes by torch's numbers for them; `words` names them in a message.
struct Dtypes {
  const char* words;
  int32_t codes[3];
};

inline const Dtypes kFloats = {
    "float32, bfloat16 or float16",
    {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()}};
inline const Dtypes kFloat32 = {
    "float32", {kFloats.codes[0], kFloats.codes[0], kFloats.codes[0]}};
inline const Dtypes kWide = {
    "float32 or float64",
    {kFloats.codes[0], aoti_torch_dtype_float64(), aoti_torch_dtype_float64()}};
inline const Dtypes kInt32 = {
    "int32", {aoti_torch_dtype_int32(), aoti_torch_dtype_int32(), aoti_torch_dtype_int32()}};
inline const Dtypes kInt64 = {
    "int64", {aoti_torch_dtype_int64(), aoti_torch_dtype_int64(), aoti_torch_dtype_int64()}};
inline const Dtypes kIntegers = {
    "int32 or int64", {kInt32.codes[0], kInt64.codes[0], kInt64.codes[0]}};
inline const Dtypes kBool = {
    "bool", {aoti_torch_dtype_bool(), aoti_torch_dtype_bool(), aoti_torch_dtype_bool()}};

// Ends a call: a RuntimeError in Python that says all of `words`.
template <typename... Words>
[[noreturn, gnu::cold]] void refuse(const Words&... words) {
  throw std::runtime_error(torch::headeronly::detail::stdTorchCheckMsgImpl("", words...));
}

// What failing checks say.
namespace words {

inline std::string dtype(int32_t code) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float64(), "float64"},   {aoti_torch_dtype_float32(), "float32"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"}, {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_int64(), "int64"},       {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},       {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},       {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex64(), "complex64"}};
  for (const auto& [known, name] : names) {
    if (known == code) return name;
  }
  return "number " + std::to_string(code);
}

inline std::string shape(const int64_t* sizes, int64_t dims) {
  std::string text = "[";
  for (int64_t d = 0; d < dims; ++d) {
    text += d == 0 ? "" : ", ";
    text += sizes[d] == kAny    ? "any"
            : sizes[d] == kSome ? "at least 1"
                                : std::to_string(sizes[d]);
  }
  return text + "]";
}

}  // namespace words

// A tensor under the name that it has in the op's schema. The checks return it, to be chained.
class Argument {
 public:
  Argument(const char* name, const Tensor& z) : name_(name), handle_(z.get()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(z.get(), &dims_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(z.get(), &sizes_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(z.get(), &dtype_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(z.get(), &device_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(z.get(), &index_));
  }

  int64_t dims() const { return dims_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t elements() const {
    int64_t count = 1;
    for (int64_t d = 0; d < dims_; ++d) count *= sizes_[d];
    return count;
  }

  bool is(const Dtypes& some) const {
    return std::find(some.codes, some.codes + 3, dtype_) != some.codes + 3;
  }

  const Argument& dtype(const Dtypes& wanted) const {
    if (!is(wanted)) {
      refuse(name_, ": got dtype ", words::dtype(dtype_), ", takes ", wanted.words);
    }
    return *this;
  }

  // The dtype that another one has.
  const Argument& as(const Argument& other) const {
    if (dtype_ != other.dtype_) {
      refuse(name_, ": got dtype ", words::dtype(dtype_), ", takes ",
                      words::dtype(other.dtype_), ", that of ", other.name_);
    }
    return *this;
  }

  // The device that another one is on.
  const Argument& on(const Argument& other) const {
    if (device_ != other.device_ || index_ != other.index_) {
      refuse(name_, ": got another device (number ", index_, " of type ", device_,
                      ") than ", other.name_, " (number ", other.index_, " of type ",
                      other.device_, "), takes the same");
    }
    return *this;
  }

  // These sizes; kAny and kSome stand for any and for at least 1.
  const Argument& shape(std::initializer_list<int64_t> wanted) const {
    bool fits = dims_ == static_cast<int64_t>(wanted.size());
    for (int64_t d = 0; fits && d < dims_; ++d) {
      const int64_t size = wanted.begin()[d];
      fits = size == kAny || (size == kSome ? sizes_[d] >= 1 : sizes_[d] == size);
    }
    if (!fits) refuse_shape(words::shape(wanted.begin(), static_cast<int64_t>(wanted.size())));
    return *this;
  }

  // The sizes that another one has.
  const Argument& like(const Argument& other) const {
    if (dims_ != other.dims_ || !std::equal(sizes_, sizes_ + dims_, other.sizes_)) {
      refuse_shape(words::shape(other.sizes_, other.dims_) + ", that of " + other.name_);
    }
    return *this;
  }

  const Argument& one_element() const {
    if (elements() != 1) refuse_shape("one element");
    return *this;
  }

  const Argument& contiguous() const {
    bool is_contiguous;
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_, &is_contiguous));
    if (!is_contiguous) {
      int64_t* strides;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides));
      refuse(name_, ": got strides ", words::shape(strides, dims_), " for shape ",
                      words::shape(sizes_, dims_), ", takes a contiguous tensor");
    }
    return *this;
  }

  // A number that every kernel reads or a tensor that every kernel writes: contiguous, of `wanted`,
  // beside `other`.
  const Argument& plain(const Dtypes& wanted, const Argument& other) const {
    return dtype(wanted).on(other).contiguous();
  }

  [[noreturn]] void refuse_shape(const std::string& wanted) const {
    refuse(name_, ": got shape ", words::shape(sizes_, dims_), ", takes ", wanted);
  }

 private:
  const char* name_;
  AtenTensorHandle handle_;
  int64_t dims_;
  int64_t* sizes_;
  int32_t dtype_, device_, index_;
};

inline void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    refuse(name, ": got ", value, ", takes ", least, " to ", most);
  }
}

template <typename T>
void check_count(const char* name, const std::vector<T>& list, size_t least, size_t most) {
  if (list.size() < least || list.size() > most) {
    if (least == most) {
      refuse(name, ": got ", list.size(), " numbers, takes ", least);
    }
    refuse(name, ": got ", list.size(), " numbers, takes ", least, " to ", most);
  }
}

// That `name`, which makes a tensor of a x b x c elements, does not ask for more than memory can
// hold; all are at least 0.
inline void check_product(const char* name, int64_t a, int64_t b, int64_t c) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product) || __builtin_mul_overflow(product, c, &product) ||
      product > kMostElements) {
    refuse(name, ": got ", a, " x ", b, " x ", c, " elements, takes at most 2^48");
  }
}

}  // namespace common
