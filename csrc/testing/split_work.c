/* Stands in for torch's parallel_for (loaded before torch, by LD_PRELOAD): each range is cut into pieces of one grain, and the last
   piece is done first, on one thread. Results that depend on how work is shared differ from those of a single piece, always. */
#include <stdint.h>

static int64_t most_pieces = 0;

int64_t most_pieces_since_last_call(void) {
  int64_t most = most_pieces;
  most_pieces = 0;
  return most;
}

int torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*function)(int64_t, int64_t, void*), void* context) {
  int64_t step = grain > 0 ? grain : 1;
  int64_t pieces = end > begin ? (end - begin + step - 1) / step : 0;
  if (pieces > most_pieces) most_pieces = pieces;
  for (int64_t piece = pieces - 1; piece >= 0; --piece) {
    int64_t first = begin + piece * step;
    function(first, first + step < end ? first + step : end, context);
  }
  return 0;
}
