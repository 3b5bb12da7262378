// Strassen's product of matrices, twice over: of 4 x 4 parts each, with 49 products of parts where the definition takes
// 64 (V. Strassen, Gaussian elimination is not optimal, Numerische Mathematik 13, 1969). Integers that wrap around are a
// ring, so there it is exact whatever its intermediate sums are, as long as the results fit.
#pragma once

namespace fastsparse::strassen {

inline constexpr int kSide = 4, kParts = kSide * kSide, kProducts = 49;

// One, two or four of a matrix's parts, numbered row by row: their sum or, if `minus`, the first half less the second.
struct Combination {
  int count, part[4];
  bool minus;
};
// The product of a combination of the left matrix and one of the right is a term of the parts of the result that the
// third has, with its sign there.
struct Product {
  Combination left, right, result;
};

// One step: of quarters 11, 12, 21, 22.
constexpr Product kStep[7] = {
    {{2, {0, 3}, false}, {2, {0, 3}, false}, {2, {0, 3}, false}}, {{2, {2, 3}, false}, {1, {0}, false}, {2, {2, 3}, true}},
    {{1, {0}, false}, {2, {1, 3}, true}, {2, {1, 3}, false}},     {{1, {3}, false}, {2, {2, 0}, true}, {2, {0, 2}, false}},
    {{2, {0, 1}, false}, {1, {3}, false}, {2, {1, 0}, true}},     {{2, {2, 0}, true}, {2, {0, 1}, false}, {1, {3}, false}},
    {{2, {1, 3}, true}, {2, {2, 3}, false}, {1, {0}, false}},
};

// By the definition: a product of two quarters has to come up in the quarter of the result that it belongs to, and only there.
static_assert([] {
  auto sign = [](const Combination& of, int part) {
    for (int i = 0; i < of.count; ++i)
      if (of.part[i] == part) return of.minus && i == 1 ? -1 : 1;
    return 0;
  };
  for (int i = 0; i < 4 * 4 * 4; ++i) {
    int left = i / 16, right = i / 4 % 4, result = i % 4, total = 0;
    for (const Product& p : kStep) total += sign(p.left, left) * sign(p.right, right) * sign(p.result, result);
    if (total != (left % 2 == right / 2 && result == left / 2 * 2 + right % 2)) return false;
  }
  return true;
}());

// Product i * 7 + j is of combination j of combination i: of quarters' quarters.
struct Results {
  Combination of[kProducts];
};
constexpr Results kResults = [] {
  Results results{};
  for (int p = 0; p < kProducts; ++p) {
    const Combination &outer = kStep[p / 7].result, &inner = kStep[p % 7].result;
    Combination& result = results.of[p] = {outer.count * inner.count, {}, outer.minus || inner.minus};
    int plus = 0, minus = result.count / 2;
    for (int o = 0; o < outer.count; ++o)
      for (int i = 0; i < inner.count; ++i) {
        bool negative = (outer.minus && o == 1) != (inner.minus && i == 1);
        int of = outer.part[o], in = inner.part[i];
        result.part[negative ? minus++ : plus++] = (of / 2 * 2 + in / 2) * kSide + of % 2 * 2 + in % 2;
      }
  }
  return results;
}();

}  // namespace fastsparse::strassen
