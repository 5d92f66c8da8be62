// The inner loops of sample_from_logits as one table entry per instruction set. Kept apart from sample_from_logits.h so
// that the files compiled for one instruction set include nothing else.
#pragma once

#include <cstdint>

namespace dcar {

constexpr int64_t kSampleChunk = 512;  // logits that one call of `survivors` looks at

// The noise of one row, and what turns it into a bound on a score.
struct SampleRow {
  enum Kind { kNoNoise, kCounter, kUniforms } kind;
  uint32_t key0, key1, token, step;  // kCounter
  float inverse_temperature;
  float tau;
};

// An element that may win: its place in the chunk, a bound that its score does not exceed up to the rounding of
// logit * inverse_temperature, its random word.
struct Survivor {
  int32_t place;
  float bound;
  uint32_t word;  // kCounter
};

struct SampleScanKernel {
  // x = cond + guidance * (cond - uncond), rounded after every operation, NaN replaced by -inf; or x = cond.
  // x is padded with -inf up to a whole chunk, and `chunk_largest` gets the largest x of each chunk.
  void (*guide_float)(const float* cond, const float* uncond, int64_t columns, float guidance, float* x,
                      float* chunk_largest);
  void (*guide_bfloat16)(const uint16_t* cond, const uint16_t* uncond, int64_t columns, float guidance, float* x,
                         float* chunk_largest);

  // The elements of one chunk whose bound is not less than `threshold`, NaN included, and how many there are. The chunk
  // is x[0..kSampleChunk), `first` the column of x[0], and `uniforms`, for kUniforms, belong to the same columns.
  int (*survivors)(const float* x, int64_t first, const float* uniforms, const SampleRow& row, float threshold,
                   Survivor* found);
};

extern const SampleScanKernel kSampleScanGeneric;
#ifdef DCAR_FAST_X86
extern const SampleScanKernel kSampleScanAvx2;
extern const SampleScanKernel kSampleScanAvx512;
#endif

}  // namespace dcar
