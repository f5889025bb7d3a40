#include <tuple>

#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

Logits logits_of(const Tensor& x, const Tensor& head) {
  check(
      x.dim() == 2 && head.dim() == 2 && x.size(1) == head.size(1),
      "x, head: expected [tokens, features] and [vocabulary, features]");
  check(x.scalar_type() == head.scalar_type(), "x, head: expected one dtype");
  return {x.const_data_ptr(), head.const_data_ptr(), dtype_of(x, "x: expected dtype float32, bfloat16 or float16"), x.size(1)};
}

std::tuple<Tensor, Tensor> linear_kl_of(Tensor x, Tensor head, Tensor teacher_x, Tensor teacher_head, double temperature) {
  const Tensor dense[] = {
      torch::stable::contiguous(x), torch::stable::contiguous(head), torch::stable::contiguous(teacher_x),
      torch::stable::contiguous(teacher_head)};
  const Logits student = logits_of(dense[0], dense[1]), teacher = logits_of(dense[2], dense[3]);
  const int64_t tokens = x.size(0), vocabulary = head.size(0);
  check(
      teacher_x.size(0) == tokens && teacher_head.size(0) == vocabulary,
      "teacher_x, teacher_head: expected the tokens of x and the vocabulary of head");
  check(vocabulary > 0 && student.features > 0 && teacher.features > 0, "head: expected at least one word and one feature");
  check(temperature > 0, "temperature: expected above 0");
  Tensor kl = torch::stable::new_empty(x, {tokens}, ScalarType::Float);
  Tensor grad = torch::stable::new_empty(x, {tokens, x.size(1)}, ScalarType::Float);
  linear_kl(student, teacher, tokens, vocabulary, temperature, float_data(kl), float_data(grad), torch_executor());
  return {kl, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("linear_kl", TORCH_BOX(&linear_kl_of)); }

}  // namespace sparsekern::cpu
