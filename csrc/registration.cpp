#include "registration.h"

#include <dlfcn.h>

#include <cstring>
#include <new>
#include <string>
#include <string_view>

namespace fastsparse {

namespace {

// An entry of a form: "weight (M, D) int64?".
struct Entry {
  std::string_view name, shape, dtype;
  bool optional;
};

// The first entry of a form, which is left without it.
Entry take_entry(std::string_view& form) {
  size_t open = form.find(" ("), close = form.find(')'), end = std::min(form.find_first_of(",|", close), form.size());
  Entry entry{form.substr(0, open), form.substr(open + 2, close - open - 2), form.substr(close + 1, end - close - 1),
              false};
  while (entry.dtype.ends_with(' ')) entry.dtype.remove_suffix(1);
  if ((entry.optional = entry.dtype.ends_with('?'))) entry.dtype.remove_suffix(1);
  if (entry.dtype.starts_with(' ')) entry.dtype.remove_prefix(1);
  form.remove_prefix(std::min(end + 2, form.size()));
  return entry;
}

int64_t dimensions(std::string_view shape) { return 1 + std::count(shape.begin(), shape.end(), ','); }

// What letters stand for.
class Sizes {
 public:
  Sizes() { sizes_.fill(-1); }

  int64_t& of(char letter) { return sizes_[letter & 63]; }  // different for all letters
  void without_sequences() { packed_ = false; }

  // Whether a tensor has a shape; letters that stood for nothing yet stand for its sizes then.
  bool fits(const Tensor& tensor, std::string_view shape) {
    if (tensor.dim() != dimensions(shape)) return false;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      auto [symbol, more] = next(shape);
      int64_t size = tensor.size(dim) - more;
      int64_t wanted = symbol <= '9' ? symbol - '0' : of(symbol);
      if (wanted < 0) of(symbol) = wanted = size;
      if (size != wanted || size < 0) return false;
    }
    return true;
  }

  // "(M, D) = (5, 3)"; "?" for what is still free.
  std::string describe(std::string_view shape) {
    std::string sizes, form(shape);
    for (int64_t left = dimensions(shape); left > 0; --left) {
      auto [symbol, more] = next(shape);
      int64_t size = symbol <= '9' ? symbol - '0' : of(symbol);
      sizes += size < 0 ? "?" : std::to_string(size + more);
      if (left > 1) sizes += ", ";
    }
    return "(" + form + ") = (" + sizes + ")";
  }

 private:
  struct Symbol { char letter; int64_t more; };
  Symbol next(std::string_view& shape) const {
    size_t end = std::min(shape.find(", "), shape.size());
    char letter = shape[0] == 'S' && !packed_ ? 'B' : shape[0];
    int64_t more = end > 1;  // "S + 1"
    shape.remove_prefix(std::min(end + 2, shape.size()));
    return {letter, more};
  }

  std::array<int64_t, 64> sizes_;
  bool packed_ = true;
};

std::string shape_of(const Tensor& tensor) {
  std::string shape;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) shape += (dim ? ", " : "") + std::to_string(tensor.size(dim));
  return "(" + shape + ")";
}

[[noreturn]] void refuse(const char* op, std::string_view name, const std::string& must) {
  throw std::invalid_argument(std::string(op) + ": " + std::string(name) + " must " + must);
}

}  // namespace

namespace {
Form* forms = nullptr;  // of the library's ops; a constant, and so there before any of them
}  // namespace

Form::Form(const char* op) : op_(op), next_(forms) { forms = this; }

void Form::tell(const char* op, const char* text) {
  for (Form* form = forms; form; form = form->next_)
    if (!std::strcmp(form->op_, op)) form->text_ = text;
}

void Form::check(const Tensor* const* tensors) const {
  const char* op = op_;
  if (text_.empty()) throw std::logic_error(std::string(op) + ": its library must be loaded by import fastsparse");
  std::string_view form(text_);
  if (size_t bar = form.find(" | "); bar != form.npos) {
    std::string_view other = form.substr(bar + 3);
    form = form.substr(0, bar);
    // Of the forms that name all the tensors there are, the one with the first's number of dimensions.
    size_t named = std::count(form.begin(), form.end(), '('), all = std::count(other.begin(), other.end(), '(');
    bool more = false;
    for (size_t i = named; i < all; ++i) more = more || tensors[i];
    std::string_view first = form, second = other;
    bool fits = tensors[0]->dim() == dimensions(take_entry(first).shape);
    if (more || (!fits && tensors[0]->dim() == dimensions(take_entry(second).shape))) form = other;
  }
  Sizes sizes;
  size_t position = 0;
  for (std::string_view rest = form; !rest.empty(); ++position)
    if (take_entry(rest).name == "cu_seqlens" && !tensors[position]) sizes.without_sequences();
  const Tensor& first = *tensors[0];
  ScalarType dtype = first.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half && dtype != ScalarType::Double)
    refuse(op, form.substr(0, form.find(' ')), "be float32, bfloat16, float16 or float64");
  position = 0;
  for (std::string_view rest = form; !rest.empty(); ++position) {
    Entry entry = take_entry(rest);
    if (!tensors[position] && !entry.optional) refuse(op, entry.name, "be given with what the other tensors are");
    if (!tensors[position]) continue;
    const Tensor& tensor = *tensors[position];
    if (!sizes.fits(tensor, entry.shape))
      refuse(op, entry.name, "have shape " + sizes.describe(entry.shape) + ", got " + shape_of(tensor));
    ScalarType wanted = entry.dtype.empty()     ? dtype
                        : entry.dtype == "wide" ? (dtype == ScalarType::Double ? dtype : ScalarType::Float)
                        : entry.dtype == "bool" ? ScalarType::Bool
                                                : ScalarType::Long;
    if (tensor.scalar_type() != wanted)
      refuse(op, entry.name, entry.dtype.empty() ? "have the dtype of the first tensor"
             : entry.dtype == "wide" ? "have the dtype that sums are carried in"
                                     : "be " + std::string(entry.dtype));
    if (tensor.is_cpu() != first.is_cpu() || tensor.get_device_index() != first.get_device_index())
      refuse(op, entry.name, "be on the device of the first tensor");
  }
}

void explain(const char* op, const std::exception& error) {
  std::string who = std::string(op) + ": ";
  if (dynamic_cast<const std::bad_alloc*>(&error))
    throw std::runtime_error(who + (std::strstr(error.what(), "memory") ? error.what() : "out of memory"));
  if (!std::strstr(error.what(), "API call failed")) throw;
  // From 2.13 on PyTorch keeps what it had to say; earlier ones have written it to standard error.
  using Message = const char* (*)();
  static const auto message =
      reinterpret_cast<Message>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  throw std::runtime_error(who + "PyTorch failed: " +
                           (message ? message() : "its reason stands in what it wrote to standard error"));
}

}  // namespace fastsparse

extern "C" __attribute__((visibility("default"))) void fastsparse_tell_form(const char* op, const char* form) {
  fastsparse::Form::tell(op, form);
}
