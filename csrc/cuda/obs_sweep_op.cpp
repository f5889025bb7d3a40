#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/addmm.h"
#include "cuda/kernels.h"
#include "cuda/tensors.h"

namespace sparsekern::cuda {

namespace {

constexpr int64_t kMaxColumns = 128, kMaxGroup = 64, kMaxTiles = 8;

void check_matrix(const Tensor& tensor, ScalarType type, int64_t rows, int64_t columns, const char* message) {
  check(
      tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.scalar_type() == type &&
          tensor.is_contiguous(),
      message);
}

// Vectors of four are read at these addresses. Columns are multiples of four, so that all later vectors are aligned too.
void check_alignment(std::initializer_list<Tensor> tensors) {
  for (const Tensor& tensor : tensors) {
    check(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, "expected tensors that begin at multiples of 16 bytes");
  }
}

ObsBlock block_of(const Tensor& weight, const Tensor& factor, const Tensor& status, int64_t begin, int64_t end) {
  check(weight.dim() == 2 && weight.is_contiguous(), "weight: expected a contiguous matrix");
  ObsBlock block = {};
  block.dtype = dtype_of(weight, "weight: expected dtype float32, bfloat16 or float16");
  block.rows = weight.size(0), block.columns = weight.size(1);
  check_matrix(factor, ScalarType::Float, block.columns, block.columns, "factor: expected a contiguous square float32 matrix");
  check(block.columns % 4 == 0 && begin % 4 == 0, "weight, begin: expected columns and blocks in multiples of four");
  check(begin >= 0 && begin <= end && end <= block.columns, "begin, end: expected columns of weight");
  check(end - begin <= kMaxColumns, "end: expected at most 128 columns");
  check(status.numel() == 1 && status.scalar_type() == ScalarType::Int, "status: expected one int32");
  check_alignment({weight, factor});
  block.weight = weight.const_data_ptr();
  block.factor = static_cast<const float*>(factor.const_data_ptr());
  block.status = data_of<int>(status);
  block.begin = begin;
  block.width = static_cast<int>(end - begin);
  return block;
}

void set_warps(ObsBlock& block, int64_t warps) {
  check(warps == 1 || warps == 2 || warps == 4 || warps == 8, "warps: expected 1, 2, 4 or 8");
  block.warps = static_cast<int>(warps);
}

void set_results(ObsBlock& block, const Tensor& delta, const Tensor& mask, const Tensor& new_weight, const Tensor& row_error) {
  check_matrix(delta, ScalarType::Float, block.rows, block.columns, "delta: expected contiguous float32 of the shape of weight");
  check_matrix(mask, ScalarType::Bool, block.rows, block.columns, "mask: expected contiguous bool of the shape of weight");
  check(
      new_weight.dim() == 2 && new_weight.size(0) == block.rows && new_weight.size(1) == block.columns &&
          new_weight.is_contiguous() && dtype_of(new_weight, "new_weight: expected the dtype of weight") == block.dtype,
      "new_weight: expected contiguous memory like weight");
  check(
      row_error.dim() == 1 && row_error.size(0) == block.rows && row_error.scalar_type() == ScalarType::Float &&
          row_error.is_contiguous(),
      "row_error: expected one float32 a row");
  check_alignment({delta, mask, new_weight});
  block.delta = data_of<float>(delta) + block.begin;
  block.delta_stride = block.columns;
  block.mask = data_of<uint8_t>(mask);
  block.new_weight = new_weight.mutable_data_ptr();
  block.row_error = data_of<float>(row_error);
}

void set_choice(ObsBlock& block, const std::string& choice, int64_t kept, int64_t group) {
  check(choice == "given" || choice == "group" || choice == "row", "choice: expected given, group or row");
  block.choice = choice == "given" ? ObsChoice::given : choice == "group" ? ObsChoice::group : ObsChoice::row;
  if (choice == "group") {
    check(
        group > 0 && group <= kMaxGroup && block.width % group == 0,
        "group: expected at most 64 and a divisor of the block's columns");
    block.group = static_cast<int>(group);
  }
  check(kept >= 0 && kept <= kMaxColumns, "kept: expected a number of weights of a group or of a row");
  block.kept = kept;
}

void obs_sweep_block_of(
    Tensor weight, Tensor factor, Tensor delta, Tensor mask, Tensor new_weight, Tensor row_error, Tensor status, int64_t begin,
    int64_t end, std::string choice, int64_t kept, int64_t group, int64_t warps) {
  ObsBlock block = block_of(weight, factor, status, begin, end);
  set_warps(block, warps);
  set_results(block, delta, mask, new_weight, row_error);
  set_choice(block, choice, kept, group);
  const DeviceGuard guard(weight);
  obs_sweep_block(block, current_stream(weight));
}

// Neighbouring blocks of columns of a sweep: block `i` begins at `borders[i]` and ends at `ends[i]`, and its padding at the next border.
struct Blocks {
  std::vector<int64_t> borders, ends, kept;

  Blocks(std::vector<int64_t> given_borders, std::vector<int64_t> given_ends, std::vector<int64_t> given_kept)
      : borders(std::move(given_borders)), ends(std::move(given_ends)), kept(std::move(given_kept)) {
    check(
        borders.size() == ends.size() + 1 && kept.size() == ends.size(),
        "borders, ends, kept: expected one more border than blocks");
    for (size_t i = 0; i < ends.size(); ++i) {
      check(borders[i] <= ends[i] && ends[i] <= borders[i + 1], "borders, ends: expected ascending columns");
    }
  }

  int64_t count() const { return static_cast<int64_t>(ends.size()); }
};

// Prunes blocks by halves, as `by_halves` of sparsekern/backends/obs_sweep.py: `prune(i)` for each, and one product before each but the
// first. With `fresh`, nothing is pending yet, so that products from the first block are the first to write their columns.
class ByHalves {
 public:
  ByHalves(const Blocks& blocks, const Tensor& delta, const Tensor& factor, bool fresh)
      : blocks_(blocks), delta_(delta), factor_(factor), fresh_(fresh) {}

  template <class Prune>
  void run(int64_t first, int64_t last, const Prune& prune) {
    if (last - first < 2) {
      if (last != first) prune(first);
      return;
    }
    int64_t middle = first + 1;
    while (2 * (middle - first) < last - first) middle += middle - first;
    run(first, middle, prune);
    update(first, middle, last);
    run(middle, last, prune);
  }

 private:
  void update(int64_t first, int64_t middle, int64_t last) {
    const int64_t a = blocks_.borders[first], b = blocks_.borders[middle], c = blocks_.borders[last];
    Tensor rows = torch::stable::narrow(factor_, 0, a, b - a);
    add_product(
        torch::stable::narrow(delta_, 1, b, c - b), torch::stable::narrow(delta_, 1, a, b - a),
        torch::stable::narrow(rows, 1, b, c - b), fresh_ && first == 0);
  }

  const Blocks& blocks_;
  Tensor delta_, factor_;
  bool fresh_;
};

void obs_sweep_blocks_of(
    Tensor weight, Tensor factor, Tensor delta, Tensor mask, Tensor new_weight, Tensor row_error, Tensor status,
    std::vector<int64_t> borders, std::vector<int64_t> ends, std::vector<int64_t> kept, std::string choice, int64_t group,
    int64_t warps, bool fresh) {
  const Blocks blocks(std::move(borders), std::move(ends), std::move(kept));
  const DeviceGuard guard(weight);
  ByHalves(blocks, delta, factor, fresh).run(0, blocks.count(), [&](int64_t i) {
    ObsBlock block = block_of(weight, factor, status, blocks.borders[i], blocks.ends[i]);
    set_warps(block, warps);
    set_results(block, delta, mask, new_weight, row_error);
    set_choice(block, choice, blocks.kept[i], group);
    obs_sweep_block(block, current_stream(weight));
  });
}

// Returns the workspace of obs_sweep_competing_block: zeroed words for each of `calls` calls, and words that the calls share. The
// third result is the number of tiles to call it with, 0 if there are too many rows.
std::tuple<Tensor, Tensor, int64_t> obs_sweep_workspace_of(Tensor weight, int64_t calls) {
  check(weight.dim() == 2 && calls >= 0, "weight, calls: expected a matrix and a number of calls");
  const DeviceGuard guard(weight);
  Tensor cleared = torch::stable::new_empty(weight, {calls, obs_sweep_cleared_words()}, ScalarType::Int);
  torch::stable::zero_(cleared);
  Tensor shared = torch::stable::new_empty(weight, {obs_sweep_shared_words(weight.size(0))}, ScalarType::Int);
  return {cleared, shared, obs_sweep_tiles(weight.size(0))};
}

void set_competition(ObsBlock& block, const Tensor& cleared, const Tensor& shared, int64_t kept, int64_t tiles, int64_t call) {
  check(
      cleared.dim() == 2 && cleared.size(1) == obs_sweep_cleared_words() && cleared.scalar_type() == ScalarType::Int &&
          cleared.is_contiguous(),
      "cleared: expected that of obs_sweep_workspace");
  check(
      shared.numel() == obs_sweep_shared_words(block.rows) && shared.scalar_type() == ScalarType::Int && shared.is_contiguous(),
      "shared: expected that of obs_sweep_workspace for this weight");
  check(call >= 0 && call < cleared.size(0), "call: expected a row of cleared");
  check(tiles >= 1 && tiles <= kMaxTiles, "tiles: expected those of obs_sweep_workspace");
  check(kept >= 0 && kept <= block.rows * block.width, "kept: expected a number of weights of the block");
  check_alignment({cleared, shared});
  block.choice = ObsChoice::block;
  block.kept = kept;
  block.tiles = static_cast<int>(tiles);
  block.cleared = data_of<uint32_t>(cleared) + call * obs_sweep_cleared_words();
  block.shared = data_of<uint32_t>(shared);
}

void obs_sweep_competing_block_of(
    Tensor weight, Tensor factor, Tensor delta, Tensor mask, Tensor new_weight, Tensor row_error, Tensor status, Tensor cleared,
    Tensor shared, int64_t begin, int64_t end, int64_t kept, int64_t tiles, int64_t call) {
  ObsBlock block = block_of(weight, factor, status, begin, end);
  set_results(block, delta, mask, new_weight, row_error);
  set_competition(block, cleared, shared, kept, tiles, call);
  const DeviceGuard guard(weight);
  obs_sweep_block(block, current_stream(weight));
}

void obs_sweep_competing_blocks_of(
    Tensor weight, Tensor factor, Tensor delta, Tensor mask, Tensor new_weight, Tensor row_error, Tensor status, Tensor cleared,
    Tensor shared, std::vector<int64_t> borders, std::vector<int64_t> ends, std::vector<int64_t> kept, int64_t tiles, int64_t call,
    bool fresh) {
  const Blocks blocks(std::move(borders), std::move(ends), std::move(kept));
  const DeviceGuard guard(weight);
  ByHalves(blocks, delta, factor, fresh).run(0, blocks.count(), [&](int64_t i) {
    ObsBlock block = block_of(weight, factor, status, blocks.borders[i], blocks.ends[i]);
    set_results(block, delta, mask, new_weight, row_error);
    set_competition(block, cleared, shared, blocks.kept[i], tiles, call + i);
    obs_sweep_block(block, current_stream(weight));
  });
}

void obs_sweep_scores_of(
    Tensor weight, Tensor factor, Tensor delta, Tensor scores, Tensor status, int64_t begin, int64_t end, int64_t first,
    int64_t warps) {
  ObsBlock block = block_of(weight, factor, status, begin, end);
  set_warps(block, warps);
  check(delta.dim() == 2, "delta: expected 2 dimensions");
  const int64_t stride = delta.size(1);
  check_matrix(delta, ScalarType::Float, block.rows, stride, "delta: expected contiguous float32 with the rows of weight");
  check_matrix(scores, ScalarType::Float, block.rows, stride, "scores: expected the shape of delta");
  check(first % 4 == 0 && stride % 4 == 0, "first, delta: expected multiples of four columns");
  check(first <= begin && end <= first + stride, "first: expected the column of weight that delta begins with");
  check_alignment({delta, scores});
  block.delta = data_of<float>(delta) + (begin - first);
  block.delta_stride = stride;
  block.scores = data_of<float>(scores) + (begin - first);
  const DeviceGuard guard(weight);
  obs_sweep_scores(block, current_stream(weight));
}

void check_factor_of(Tensor factor, Tensor status) {
  check(factor.scalar_type() == ScalarType::Float && factor.is_contiguous(), "factor: expected contiguous float32");
  check(factor.numel() % 4 == 0, "factor: expected a multiple of four columns");
  check_alignment({factor});
  check(status.numel() == 1 && status.scalar_type() == ScalarType::Int, "status: expected one int32");
  const DeviceGuard guard(factor);
  const auto* values = static_cast<const float*>(factor.const_data_ptr());
  obs_sweep_check_factor(values, factor.numel(), data_of<int>(status), current_stream(factor));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) {
  m.def(
      "obs_sweep_block(Tensor weight, Tensor factor, Tensor(a!) delta, Tensor(b!) mask, Tensor(c!) new_weight, Tensor(d!) "
      "row_error, "
      "Tensor(e!) status, int begin, int end, str choice, int kept, int group, int warps) -> ()");
  m.def(
      "obs_sweep_scores(Tensor weight, Tensor factor, Tensor(a!) delta, Tensor(b!) scores, Tensor(c!) status, int begin, int end, "
      "int first, int warps) -> ()");
  m.def("obs_sweep_workspace(Tensor weight, int calls) -> (Tensor, Tensor, int)");
  m.def(
      "obs_sweep_competing_block(Tensor weight, Tensor factor, Tensor(a!) delta, Tensor(b!) mask, Tensor(c!) new_weight, "
      "Tensor(d!) row_error, Tensor(e!) status, Tensor(f!) cleared, Tensor(g!) shared, int begin, int end, int kept, int tiles, "
      "int call) -> ()");
  m.def(
      "obs_sweep_blocks(Tensor weight, Tensor factor, Tensor(a!) delta, Tensor(b!) mask, Tensor(c!) new_weight, Tensor(d!) "
      "row_error, Tensor(e!) status, int[] borders, int[] ends, int[] kept, str choice, int group, int warps, bool fresh) -> ()");
  m.def(
      "obs_sweep_competing_blocks(Tensor weight, Tensor factor, Tensor(a!) delta, Tensor(b!) mask, Tensor(c!) new_weight, "
      "Tensor(d!) row_error, Tensor(e!) status, Tensor(f!) cleared, Tensor(g!) shared, int[] borders, int[] ends, int[] kept, "
      "int tiles, int call, bool fresh) -> ()");
  m.def("obs_sweep_check_factor(Tensor factor, Tensor(a!) status) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) {
  m.impl("obs_sweep_block", TORCH_BOX(&obs_sweep_block_of));
  m.impl("obs_sweep_scores", TORCH_BOX(&obs_sweep_scores_of));
  m.impl("obs_sweep_workspace", TORCH_BOX(&obs_sweep_workspace_of));
  m.impl("obs_sweep_competing_block", TORCH_BOX(&obs_sweep_competing_block_of));
  m.impl("obs_sweep_blocks", TORCH_BOX(&obs_sweep_blocks_of));
  m.impl("obs_sweep_competing_blocks", TORCH_BOX(&obs_sweep_competing_blocks_of));
  m.impl("obs_sweep_check_factor", TORCH_BOX(&check_factor_of));
}

}  // namespace sparsekern::cuda
