// What stands between PyTorch's dispatcher and an op: a look at its tensors, which kernels trust, and errors in words
// that say something to whoever called it.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "options.h"
#include "tensors.h"

namespace fastsparse {

// What an op demands of its tensors, in the words of fastsparse/ops/_forms.py, which tells each library that it loads.
class Form {
 public:
  explicit Form(const char* op);
  const char* op() const { return op_; }
  // Raises ValueError unless tensors, null where they are absent, have the shapes, dtypes and device of the form.
  void check(const Tensor* const* tensors) const;
  static void tell(const char* op, const char* text);

 private:
  const char* op_;
  std::string text_;
  Form* next_;
};

// The same error with its reason, where PyTorch's stable ABI says no more than that a call has failed.
[[noreturn]] void explain(const char* op, const std::exception& error);

// One of `count` options, which are counted in a schema, and named in fastsparse/_options.py.
template <typename Option> Option option_of(const char* op, const char* name, int64_t position, int64_t count) {
  if (position < 0 || position >= count)
    throw std::invalid_argument(std::string(op) + ": " + name + " must be in [0, " + std::to_string(count) + "), got " +
                                std::to_string(position));
  return Option(position);
}

template <typename Function> struct Registered;
template <typename Result, typename... Arguments> struct Registered<Result(Arguments...)> {
  template <Result (*op)(Arguments...), const Form* form> static Result run(Arguments... arguments) {
    std::array<const Tensor*, sizeof...(Arguments)> tensors{};
    size_t count = 0;
    auto take = [&](const auto& argument) {
      using Argument = std::decay_t<decltype(argument)>;
      if constexpr (std::is_same_v<Argument, Tensor>) tensors[count++] = &argument;
      else if constexpr (std::is_same_v<Argument, std::optional<Tensor>>) tensors[count++] = argument ? &*argument : nullptr;
    };
    try {
      (take(arguments), ...);
      form->check(tensors.data());
      return op(arguments...);
    } catch (const std::logic_error&) {  // ours
      throw;
    } catch (const std::exception& error) {
      explain(form->op(), error);
    }
  }
};

}  // namespace fastsparse

// Makes a function the kernel of the op of its name, for a dispatch key, in a namespace of PyTorch's operators.
#define FASTSPARSE_REGISTER(space, key, op)                                                \
  static ::fastsparse::Form form_of_##op(#op);                                             \
  STABLE_TORCH_LIBRARY_IMPL(space, key, m) {                                               \
    m.impl(#op, TORCH_BOX((&::fastsparse::Registered<decltype(op)>::run<&op, &form_of_##op>))); \
  }
