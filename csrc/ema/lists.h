// The three lists of a call as plain memory, and whether they are plainly fit for the update.
//
// A vision transformer has 150 to 300 tensors, all of which are looked at in every call, so what a
// look costs is the host's share. As std::vector<Tensor> each would be allocated once more, with a
// reference count of its own; here the boxed lists' own handles are read.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"

namespace ema {

using torch::stable::Tensor;

enum Code : uint8_t { kFloat, kBFloat16, kFloat16, kNone };

// One tensor; sizes and strides are torch's own, and live as long as the lists.
struct View {
  void* data;
  const int64_t *sizes, *strides;
  int64_t dims, elements;
  Code dtype;  // kNone: no fused one
  bool contiguous;
};

inline int64_t item_size(Code code) { return code == kFloat ? 4 : 2; }

// Holds Python's global lock, where there is a Python. torch counts a tensor's Python object among
// its owners, and takes the lock to let go of each: 300 times in a call, a third of its time.
class PythonLock {
 public:
  PythonLock() {
    static const auto ready = find<int (*)()>("Py_IsInitialized");
    static const auto ensure = find<int (*)()>("PyGILState_Ensure");
    if (ready && ensure && leave() && ready()) state_ = ensure();
  }
  ~PythonLock() {
    if (state_) leave()(*state_);
  }
  PythonLock(const PythonLock&) = delete;
  PythonLock& operator=(const PythonLock&) = delete;

 private:
  template <typename Function>
  static Function find(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  }
  static void (*leave())(int) {
    static const auto release = find<void (*)(int)>("PyGILState_Release");
    return release;
  }
  std::optional<int> state_;
};

class Lists {
 public:
  // Takes over the three boxed lists.
  Lists(StableIValue targets, StableIValue onlines, StableIValue shadows) {
    const StableIValue boxed[3] = {targets, onlines, shadows};
    for (int k = 0; k < 3; ++k) take(boxed[k], k);
    try {
      for (int k = 0; k < 3; ++k) {
        views_[k].reserve(handles_[k].size());
        for (AtenTensorHandle handle : handles_[k]) views_[k].push_back(look(handle, k));
      }
    } catch (...) {
      release();
      throw;
    }
  }
  ~Lists() { release(); }
  Lists(const Lists&) = delete;
  Lists& operator=(const Lists&) = delete;

  size_t count() const { return views_[0].size(); }
  const View& target(size_t i) const { return views_[0][i]; }
  const View& online(size_t i) const { return views_[1][i]; }
  // null: there is none.
  const View* shadow(size_t i) const { return views_[2].empty() ? nullptr : &views_[2][i]; }
  Tensor first() const { return tensor(0, 0); }

  // Whether nothing can be wrong: dense tensors of one device and of fused dtypes, the targets'
  // shapes, and written memory that no other tensor has. A false may be too careful: op.py's own
  // checks look closer, and name what is wrong.
  bool fit() const { return matched() && apart(); }

  // Raises an error that names the first tensor by which the lists do not match; whether they
  // overlap is not looked at.
  void check() const {
    if (matched()) return;
    constexpr const char* kNames[] = {"targets", "onlines", "shadows"};
    for (int k = 1; k < 3; ++k) {
      const size_t size = views_[k].size();
      if (size == count() || (k == 2 && size == 0)) continue;
      common::refuse(kNames[k], ": got ", size, " tensors, takes ", count(),
                     ", as many as targets");
    }
    const Tensor first = tensor(0, 0);
    for (size_t i = 0; i < count(); ++i) {
      for (int k = 0; k < 3 && i < views_[k].size(); ++k) {
        const auto name = [&](int list) {
          return std::string(kNames[list]).append("[").append(std::to_string(i)).append("]");
        };
        const std::string own = name(k), target = name(0);
        const Tensor mine = tensor(k, i), like = tensor(0, i);
        common::Argument(own.c_str(), mine)
            .on({"targets[0]", first})
            .dtype(common::kFloats)
            .like({target.c_str(), like});
      }
    }
    common::refuse("targets, onlines, shadows: take dense (strided) tensors");
  }

 private:
  struct Span {
    uintptr_t begin, end;
    bool written;
  };

  Tensor tensor(int k, size_t i) const {
    AtenTensorHandle copy;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handles_[k][i], &copy));
    return Tensor(copy);
  }

  // Dense tensors of one device and of fused dtypes, of the targets' number and shapes.
  bool matched() const {
    if (!alike_ || views_[1].size() != count()) return false;
    if (!views_[2].empty() && views_[2].size() != count()) return false;
    for (size_t i = 0; i < count(); ++i) {
      if (!same_shape(views_[1][i], views_[0][i])) return false;
      if (!views_[2].empty() && !same_shape(views_[2][i], views_[0][i])) return false;
    }
    return true;
  }

  void take(StableIValue boxed, int k) {
    const auto list = torch::stable::detail::to<StableListHandle>(boxed);
    size_t size;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_[k].reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      handles_[k].push_back(torch::stable::detail::to<AtenTensorHandle>(item));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));  // not the tensors in it
  }

  View look(AtenTensorHandle handle, int k) {
    static const int32_t codes[3] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                     aoti_torch_dtype_float16()};
    static const int32_t strided = aoti_torch_layout_strided();
    View view = {};
    int32_t layout, type, index, dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &index));
    if (k == 0 && views_[0].empty()) type_ = type, index_ = index;
    if (layout != strided || type != type_ || index != index_) {
      alike_ = false;
      return view;
    }
    int64_t *sizes, *strides;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    view.dtype = static_cast<Code>(std::find(codes, codes + 3, dtype) - codes);
    alike_ = alike_ && view.dtype != kNone;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &view.dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    view.sizes = sizes;
    view.strides = strides;
    view.elements = 1;
    for (int64_t d = 0; d < view.dims; ++d) view.elements *= sizes[d];
    view.contiguous = contiguous(view);
    if (k == 1) {
      const void* data;
      TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &data));
      view.data = const_cast<void*>(data);
    } else {
      TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle, &view.data));
    }
    return view;
  }

  static bool contiguous(const View& view) {
    int64_t stride = 1;
    for (int64_t d = view.dims - 1; d >= 0; --d) {
      if (view.sizes[d] == 1) continue;
      if (view.strides[d] != stride) return view.elements == 0;
      stride *= view.sizes[d];
    }
    return true;
  }

  static bool same_shape(const View& a, const View& b) {
    return a.dims == b.dims && std::equal(a.sizes, a.sizes + a.dims, b.sizes);
  }

  // Elements from the first to past the last; 0: two of them may lie at one place.
  static int64_t span(const View& view) {
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
    for (int64_t d = 0; d < view.dims; ++d) {
      if (view.sizes[d] > 1) dims.emplace_back(view.strides[d], view.sizes[d]);
    }
    std::sort(dims.begin(), dims.end());
    int64_t reach = 1;
    for (const auto& [stride, size] : dims) {
      if (stride < reach) return 0;
      reach += stride * (size - 1);
    }
    return reach;
  }

  // Whether no element that is written is anywhere else in the lists; what is only read may be.
  bool apart() const {
    std::vector<Span> spans;
    spans.reserve(3 * count());
    for (int k = 0; k < 3; ++k) {
      for (const View& view : views_[k]) {
        if (view.elements == 0) continue;
        const int64_t elements = view.contiguous ? view.elements : span(view);
        if (elements == 0) return false;
        const auto begin = reinterpret_cast<uintptr_t>(view.data);
        spans.push_back({begin, begin + elements * item_size(view.dtype), k != 1});
      }
    }
    std::sort(spans.begin(), spans.end(),
              [](const Span& a, const Span& b) { return a.begin < b.begin; });
    uintptr_t written = 0, read = 0;  // the furthest ends so far
    for (const Span& s : spans) {
      if (s.begin < written || (s.written && s.begin < read)) return false;
      (s.written ? written : read) = std::max(s.written ? written : read, s.end);
    }
    return true;
  }

  void release() {
    const PythonLock lock;
    for (auto& handles : handles_) {
      for (AtenTensorHandle handle : handles) aoti_torch_delete_tensor_object(handle);
    }
  }

  std::vector<AtenTensorHandle> handles_[3];  // owned
  std::vector<View> views_[3];
  int32_t type_ = 0, index_ = 0;
  bool alike_ = true;
};

}  // namespace ema
