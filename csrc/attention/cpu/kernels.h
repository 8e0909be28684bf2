// The inner loops of attention on the CPU: three products, and the exponentials between them.
//
// Included once per vector width by width.h, inside a namespace that has kLanes (floats a
// vector) and under that width's target; so nothing of the standard library is used here, whose
// inline functions would be compiled for that target and then linked into the others.
//
// A product keeps a block of R rows by C vectors of its result in registers, and at each step
// multiplies C vectors of b with R broadcast elements of a: R + C loads for R C multiply-adds.
// a's strides are compile-time constants, so that all its rows hang on one address register.

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef unsigned int BitVector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr int kMostColumns = kLanes == 16 ? 4 : 2;  // with 32 vector registers, or 16
constexpr int kPanelColumns = kLanes == 16 ? 3 : 2;
constexpr int kPanel = kPanelColumns * kLanes;
constexpr int block_rows(int columns) { return kLanes == 16 && columns < 4 ? 8 : 6; }

static inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
static inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }

// c[R][C vectors] (+)= a b. a: element (i, k) at i ARow + k AStep; b: a row of C vectors a step.
template <int R, int C, int ARow, int AStep, bool Add>
static inline void block(const float* a, const float* b, long b_row, long steps, float* c,
                         long c_row) {
  Vector sum[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) sum[i][j] = Vector{};
  }
  for (long k = 0; k < steps; ++k, a += AStep, b += b_row) {
    Vector row[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) row[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const float element = a[i * ARow];
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) sum[i][j] += element * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      float* to = c + i * c_row + j * kLanes;
      store(to, Add ? load(to) + sum[i][j] : sum[i][j]);
    }
  }
}

// The last `rows` < R rows.
template <int R, int C, int ARow, int AStep, bool Add>
static inline void last_rows(const float* a, int rows, const float* b, long b_row, long steps,
                             float* c, long c_row) {
  if constexpr (R > 0) {
    if (rows == R) {
      block<R, C, ARow, AStep, Add>(a, b, b_row, steps, c, c_row);
    } else {
      last_rows<R - 1, C, ARow, AStep, Add>(a, rows, b, b_row, steps, c, c_row);
    }
  }
}

template <int C, int ARow, int AStep, bool Add>
static void all_rows(const float* a, int rows, const float* b, long b_row, long steps, float* c,
                     long c_row) {
  constexpr int R = block_rows(C);
  int i = 0;
  for (; i + R <= rows; i += R) {
    block<R, C, ARow, AStep, Add>(a + i * ARow, b, b_row, steps, c + i * c_row, c_row);
  }
  last_rows<R - 1, C, ARow, AStep, Add>(a + i * ARow, rows - i, b, b_row, steps, c + i * c_row,
                                        c_row);
}

// c [rows, vectors] (+)= a b by groups of columns.
template <int ARow, int AStep, bool Add>
static void product(const float* a, int rows, const float* b, long b_row, long steps, int vectors,
                    float* c, long c_row) {
  while (vectors > 0) {
    const int most = vectors < kMostColumns ? vectors : kMostColumns;
    const int columns = vectors == 5 && most == 4 ? 3 : most;
    if (columns == 1) all_rows<1, ARow, AStep, Add>(a, rows, b, b_row, steps, c, c_row);
    if (columns == 2) all_rows<2, ARow, AStep, Add>(a, rows, b, b_row, steps, c, c_row);
    if constexpr (kMostColumns > 2) {
      if (columns == 3) all_rows<3, ARow, AStep, Add>(a, rows, b, b_row, steps, c, c_row);
      if (columns == 4) all_rows<4, ARow, AStep, Add>(a, rows, b, b_row, steps, c, c_row);
    }
    vectors -= columns;
    b += columns * kLanes;
    c += columns * kLanes;
  }
}

// s [rows, panels kPanel] = x y^T; x: [rows, dim] of stride kTileRow; y: panels [dim, kPanel].
static void scores(const float* x, int rows, const float* y, int panels, int dim, float* s) {
  for (int panel = 0; panel < panels; ++panel, y += dim * kPanel, s += kPanel) {
    all_rows<kPanelColumns, kTileRow, 1, false>(x, rows, y, kPanel, dim, s, kScoreRow);
  }
}

// c [rows, vectors] (+)= s y; s: [rows, keys] of stride kScoreRow; y: [keys, vectors].
static void weigh(const float* s, int rows, const float* y, long y_row, int keys, int vectors,
                  bool add, float* c, long c_row) {
  if (add) {
    product<kScoreRow, 1, true>(s, rows, y, y_row, keys, vectors, c, c_row);
  } else {
    product<kScoreRow, 1, false>(s, rows, y, y_row, keys, vectors, c, c_row);
  }
}

// c [keys, vectors] += s^T x; s: [rows, keys] of stride kScoreRow; x: [rows, dim], stride kTileRow.
static void collect(const float* s, int rows, int keys, const float* x, int vectors, float* c,
                    long c_row) {
  product<1, kScoreRow, true>(s, keys, x, kTileRow, rows, vectors, c, c_row);
}

// 2^x to 0.9 units in the last place for x <= 127: 2^n by its bits and a polynomial in x - n on
// [-1/2, 1/2]. Below 2^-126 it is 0, exactly; beyond 2^127.5 infinite; NaN stays NaN.
static inline Vector exp2(Vector x) {
  const Vector low = Vector{} - 127.f, high = Vector{} + 128.f;
  x = low > x ? low : x;  // keeps a NaN
  x = high < x ? high : x;
  const float magic = 12582912.f;  // 1.5 2^23: adding it rounds to an integer
  const Vector shifted = x + magic;
  const Vector f = x - (shifted - magic);
  Vector p = f * 1.540891710e-4f + 1.339593783e-3f;
  p = p * f + 9.618231296e-3f;
  p = p * f + 5.550341763e-2f;
  p = p * f + 2.402264968e-1f;
  p = p * f + 6.931471972e-1f;
  p = p * f + 1.f;
  const BitVector bits = (reinterpret_cast<BitVector>(shifted) << 23) + 0x3f800000u;
  return p * reinterpret_cast<Vector>(bits);
}

// The largest of count (a multiple of kLanes) values, passing over NaN.
static float largest(const float* s, int count) {
  Vector most = load(s);
  for (int j = kLanes; j < count; j += kLanes) {
    const Vector value = load(s + j);
    most = value > most ? value : most;
  }
  float result = -__builtin_inff();
  for (int lane = 0; lane < kLanes; ++lane) result = most[lane] > result ? most[lane] : result;
  return result;
}

// s = 2^(s - shift); their sum.
static float exponentiate(float* s, int count, float shift) {
  Vector sum = Vector{};
  for (int j = 0; j < count; j += kLanes) {
    const Vector value = exp2(load(s + j) - shift);
    store(s + j, value);
    sum += value;
  }
  float result = 0.f;
  for (int lane = 0; lane < kLanes; ++lane) result += sum[lane];
  return result;
}

// s = 2^(s - shift) = p and g = p (g - delta): weights and the gradient of the scores.
static void differentiate(float* s, float* g, int count, float shift, float delta) {
  for (int j = 0; j < count; j += kLanes) {
    const Vector p = exp2(load(s + j) - shift);
    store(s + j, p);
    store(g + j, p * (load(g + j) - delta));
  }
}

constexpr Kernels kKernels = {kLanes,  kPanel,       scores,        weigh,
                              collect, largest, exponentiate, differentiate};
