#include "common/simd.h"
#include "rms_norm/rms_norm.h"

namespace nemocascade::rms_norm::NEMOCASCADE_LEVEL {

using namespace nemocascade::NEMOCASCADE_LEVEL;

namespace {

// Padded rows of floats: the weight and the buffers of a row.
class Buffers {
 public:
  explicit Buffers(const Norm& norm) : width(padded(norm.width)), all_(new float[4 * width]()) {
    copy(norm.weight, norm.width, weight());
  }
  ~Buffers() { delete[] all_; }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  INLINE float* weight() const { return all_; }
  INLINE float* x() const { return all_ + width; }
  INLINE float* dy() const { return all_ + 2 * width; }
  INLINE float* sums() const { return all_ + 3 * width; }

  const int64_t width;

 private:
  float* all_;
};

// Reads row t of x; returns 1 / sqrt(mean(x^2) + eps).
INLINE float read_row(const Norm& norm, int64_t t, const Buffers& row) {
  read(norm.x, t, 0, norm.width, row.x());
  Floats squares = {};
  for (int64_t j = 0; j < row.width; j += kLanes) {
    const Floats x = load(row.x() + j);
    squares += x * x;
  }
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(norm.width) + norm.eps);
}

void forward(const Norm& norm, int64_t begin, int64_t end, const Rows& y) {
  const Buffers row(norm);
  for (int64_t t = begin; t < end; ++t) {
    const float scale = read_row(norm, t, row);
    for (int64_t j = 0; j < row.width; j += kLanes)
      store(row.x() + j, load(row.x() + j) * scale * load(row.weight() + j));
    write(row.x(), norm.width, y, t, 0);
  }
}

void backward(const Norm& norm, int64_t begin, int64_t end, const Rows& dy, const Rows& dx,
              float* d_weight) {
  const Buffers row(norm);
  for (int64_t t = begin; t < end; ++t) {
    const float scale = read_row(norm, t, row);
    read(dy, t, 0, norm.width, row.dy());
    Floats products = {};
    for (int64_t j = 0; j < row.width; j += kLanes) {
      const Floats normed = load(row.x() + j) * scale, up = load(row.dy() + j);
      const Floats weighted = up * load(row.weight() + j);
      store(row.sums() + j, load(row.sums() + j) + up * normed);
      products += weighted * normed;
      store(row.x() + j, normed);
      store(row.dy() + j, weighted);
    }
    const float along = sum(products) / static_cast<float>(norm.width);
    for (int64_t j = 0; j < row.width; j += kLanes)
      store(row.x() + j, (load(row.dy() + j) - load(row.x() + j) * along) * scale);
    write(row.x(), norm.width, dx, t, 0);
  }
  copy(row.sums(), norm.width, d_weight);
}

}  // namespace

const Functions functions = {forward, backward};

}  // namespace nemocascade::rms_norm::NEMOCASCADE_LEVEL
