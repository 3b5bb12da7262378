// What stands between PyTorch's dispatcher and an op: a look at its tensors, which kernels trust, and errors in words
// that say something to whoever called it.
#pragma once

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "forms.h"
#include "options.h"
#include "tensors.h"

namespace fastsparse {

// Raises ValueError unless tensors, null where they are absent, have the shapes, dtypes and device of a form (forms.h).
void check_tensors(const char* op, const char* form, const Tensor* const* tensors);

// The same error with its reason, where PyTorch's stable ABI says no more than that a call has failed.
[[noreturn]] void explain(const char* op, const std::exception& error);

// One of `count` options, which are counted in a schema, and named in fastsparse/_options.py.
template <typename Option> Option option_of(const char* op, const char* name, int64_t position, int64_t count) {
  if (position < 0 || position >= count)
    throw std::invalid_argument(std::string(op) + ": " + name + " must be in [0, " + std::to_string(count) + "), got " +
                                std::to_string(position));
  return Option(position);
}

template <size_t n> struct Name {
  char text[n];
  constexpr Name(const char (&from)[n]) { std::copy_n(from, n, text); }
};

template <typename Function> struct Registered;
template <typename Result, typename... Arguments> struct Registered<Result(Arguments...)> {
  template <Result (*op)(Arguments...), Name name, const char* form> static Result run(Arguments... arguments) {
    std::array<const Tensor*, sizeof...(Arguments)> tensors{};
    size_t count = 0;
    auto take = [&](const auto& argument) {
      using Argument = std::decay_t<decltype(argument)>;
      if constexpr (std::is_same_v<Argument, Tensor>) tensors[count++] = &argument;
      else if constexpr (std::is_same_v<Argument, std::optional<Tensor>>) tensors[count++] = argument ? &*argument : nullptr;
    };
    try {
      (take(arguments), ...);
      check_tensors(name.text, form, tensors.data());
      return op(arguments...);
    } catch (const std::logic_error&) {  // ours
      throw;
    } catch (const std::exception& error) {
      explain(name.text, error);
    }
  }
};

}  // namespace fastsparse

// Makes a function the kernel of the op of its name, for a dispatch key, in a namespace of PyTorch's operators.
#define FASTSPARSE_REGISTER(space, key, op)                                                       \
  STABLE_TORCH_LIBRARY_IMPL(space, key, m) {                                                      \
    m.impl(#op, TORCH_BOX((&::fastsparse::Registered<decltype(op)>::run<&op, #op, ::fastsparse::forms::op>))); \
  }
