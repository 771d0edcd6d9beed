/* Matrix products of which every element is the same bits wherever it is computed.
 *
 * An element is a sum over k from 0 up, begun with 0. In float32 each product and each sum is rounded (the build forbids
 * contraction to fma), in float64 the two together, as fma does. Elements are computed in lanes that do not meet, so that
 * neither the number of matrices nor their sizes, addresses, threads or the width of the machine's vectors can change one.
 *
 * Build: cc -O3 -ffp-contract=off -shared -fPIC products.c -lm
 */
#ifdef __FAST_MATH__
#error "sums must keep their order"
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
enum { LANES = 8, ROWS = 4 };
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

/* Strides are counted in floats. */
struct sizes {
  int64_t matrices, rows, columns, depth;           /* rows: a multiple of 4; columns: of 8 */
  int64_t right_matrix, right_column, right_depth;  /* strides of the right operand */
  int64_t out_matrix, out_eight, out_row;           /* strides of the result: of eight rows, of a row among them */
  int64_t out_block, out_half;                      /* of eight columns, of four of them */
  int64_t even_first;                               /* those four are the even ones, then the odd ones */
};

/* Rows i to i + ROWS of the result in 8 * count columns. `panel`: 8 * count columns of the right operand by depth. */
INLINE void rows_by_panel(const struct sizes *s, int64_t i, int count, const float *left, const vector *panel,
                          float *out) {
  vector sum[ROWS][2] = {0};
  for (int64_t k = 0; k < s->depth; k++)
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < count; c++) sum[r][c] += left[(i + r) * s->depth + k] * panel[k * count + c];
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < count; c++) {
      integers nan = sum[r][c] != sum[r][c];
      /* which NaN comes out of two is the compiler's choice: all become the one that tensor cores give */
      integers bits = ((integers)sum[r][c] & ~nan) | (nan & 0x7fffffff);
      float *place = out + (i + r) / 8 * s->out_eight + (i + r) % 8 * s->out_row + c * s->out_block;
      memcpy(place, &bits, 4 * LANES / 2);
      memcpy(place + s->out_half, (char *)&bits + 4 * LANES / 2, 4 * LANES / 2);
    }
}

INLINE void fill(const struct sizes *s, int count, const float *right, float *panel) {
  static const int64_t in_order[LANES] = {0, 1, 2, 3, 4, 5, 6, 7}, evens_first[LANES] = {0, 2, 4, 6, 1, 3, 5, 7};
  const int64_t *column = s->even_first ? evens_first : in_order;
  for (int c = 0; c < count; c++)
    for (int64_t k = 0; k < s->depth; k++)
      for (int lane = 0; lane < LANES; lane++)
        panel[(k * count + c) * LANES + lane] =
            right[(c * LANES + column[lane]) * s->right_column + k * s->right_depth];
}

INLINE void panels(const struct sizes *s, int64_t first, int count, const float *left, const float *right,
                   const int64_t *right_of, float *out, vector *panel) {
  int64_t filled = -1;
  for (int64_t matrix = 0; matrix < s->matrices; matrix++) {
    int64_t mine = right_of ? right_of[matrix] : matrix;
    if (mine != filled)
      fill(s, count, right + mine * s->right_matrix + first * LANES * s->right_column, (float *)panel);
    filled = mine;
    for (int64_t i = 0; i < s->rows; i += ROWS)
      rows_by_panel(s, i, count, left + matrix * s->rows * s->depth, panel,
                    out + matrix * s->out_matrix + first * s->out_block);
  }
}

INLINE void products(const struct sizes *s, const float *left, const float *right, const int64_t *right_of,
                     float *out) {
  vector panel[2 * s->depth];
  int64_t block = 0, blocks = s->columns / LANES;
  for (; block + 2 <= blocks; block += 2) panels(s, block, 2, left, right, right_of, out, panel);
  if (block < blocks) panels(s, block, 1, left, right, right_of, out, panel);
}

__attribute__((target("avx2"))) static void products_avx2(const struct sizes *s, const float *left, const float *right,
                                                          const int64_t *right_of, float *out) {
  products(s, left, right, right_of, out);
}

/* left [matrices, rows, depth], contiguous; right by its strides, matrix right_of[i] for the i-th product, or the i-th. */
PUBLIC void ptxsim_products(const struct sizes *s, const float *left, const float *right, const int64_t *right_of,
                            float *out) {
  if (__builtin_cpu_supports("avx2"))
    products_avx2(s, left, right, right_of, out);
  else
    products(s, left, right, right_of, out);
}

INLINE void double_products(int64_t matrices, int64_t rows, int64_t columns, int64_t depth, const double *left,
                            const double *right, double *out) {
  for (int64_t row = 0; row < matrices * rows; row++)
    for (int64_t column = 0; column < columns; column++) {
      const double *a = left + row * depth, *b = right + (row / rows * columns + column) * depth;
      double sum = 0;
      for (int64_t k = 0; k < depth; k++) sum = fma(a[k], b[k], sum);
      out[row * columns + column] = sum;
    }
}

__attribute__((target("fma"))) static void double_products_fma(int64_t matrices, int64_t rows, int64_t columns,
                                                               int64_t depth, const double *left, const double *right,
                                                               double *out) {
  double_products(matrices, rows, columns, depth, left, right, out);
}

/* left [matrices, rows, depth], right [matrices, columns, depth], out [matrices, rows, columns], all contiguous. */
PUBLIC void ptxsim_double_products(int64_t matrices, int64_t rows, int64_t columns, int64_t depth, const double *left,
                                   const double *right, double *out) {
  if (__builtin_cpu_supports("fma"))
    double_products_fma(matrices, rows, columns, depth, left, right, out);
  else
    double_products(matrices, rows, columns, depth, left, right, out);
}
