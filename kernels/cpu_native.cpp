// y[m, n] = α s_x[m] Σ_b s[n, b] (Σ_{k in b} c[n, k] x[m, k] − z[n, b] Σ_{k in b} x[m, k]) + bias[n]        cpu_native.py says what is what.
//
// Rows of the weight lie beside each other in a register, 32 of them in two: a lane of 32 bits holds the codes of one row, so sums need no shuffle, a
// group's scales are one load, and the activations that all rows share are broadcast from memory. Codes of one or two bytes' worth of columns (two in
// bf16, four in int8) become one operand of a dot product by a shift and one permutation, which is a table of 32 words, or a mask.
//
// Few tokens: codes are decoded in registers and used at once, as fast as memory gives them. More: a block of columns of 32 rows is decoded into the L1
// cache, and tiles of 12 tokens by 32 rows stay in registers while they go over it, as in any matrix product (Goto and van de Geijn, 2008).

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 32, TILE = 12, TOKENS = 64, OPERANDS = 80 };  // rows of a panel; tokens of a tile, of a pass over a panel; operands of a block at most
enum Type { F32, BF16, F16 };

struct Weight {
    const uint8_t *codes;   // [panels, blocks, words, 2, 64 bytes]; of sparse weights the values that are kept
    const void *scales;     // [panels, blocks, 32] bf16 or fp32
    const void *zeros;      // the same, or null
    const uint16_t *table;  // bf16: 32 words, or 2^bits words a row; null where codes are numbers
    const uint32_t *masks;  // sparse: [panels, blocks, words, 2], a bit a weight
    const int64_t *starts;  // sparse: [panels], where a panel's values begin
    int64_t n, k, blocks, block, words;  // rows, columns, blocks of columns, columns of a block, words of a block
    int32_t kind, bits, wide;            // wide: scales and zeros are fp32
    float alpha, center, zero;           // center: what is subtracted from bytes; zero: the zero point of all, where there is no list of them
};

// ---------------------------------------------------------------------------------------------------------------- numbers

static inline __m512 widen(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }

static inline __m512 read16(const void *p, int type, int64_t i, __mmask16 k) {
    if (type == F32) return _mm512_maskz_loadu_ps(k, (const float *)p + i);
    __m256i h = _mm256_maskz_loadu_epi16(k, (const uint16_t *)p + i);
    return type == BF16 ? widen(h) : _mm512_cvtph_ps(h);
}

static inline void write16(void *p, int type, int64_t i, __m512 v, __mmask16 k) {
    if (type == F32) _mm512_mask_storeu_ps((float *)p + i, k, v);
    else _mm256_mask_storeu_epi16((uint16_t *)p + i, k, type == BF16 ? (__m256i)_mm512_cvtneps_pbh(v) : _mm512_cvtps_ph(v, 0));
}

static inline __m512 factors(const void *p, int wide, int64_t i) {
    return wide ? _mm512_loadu_ps((const float *)p + i) : widen(_mm256_loadu_si256((const __m256i *)((const uint16_t *)p + i)));
}

struct Float {  // pairs of bf16
    typedef Float Dot;
    enum { ROUNDED = 0, PLAIN = 0 };
    typedef __m512 Sum;
    static Sum none() { return _mm512_setzero_ps(); }
    static Sum dot(Sum a, __m512i w, __m512i x) { return _mm512_dpbf16_ps(a, (__m512bh)w, (__m512bh)x); }
    static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
    static __m512 real(Sum a) { return a; }
};

struct Int {  // four bytes each: unsigned codes, signed activations
    typedef Int Dot;
    enum { ROUNDED = 1 };
    typedef __m512i Sum;
    static Sum none() { return _mm512_setzero_si512(); }
    static Sum dot(Sum a, __m512i w, __m512i x) {  // gcc 12 keeps two copies of every sum of the intrinsic, and has no registers left for them
        __asm__("vpdpbusd %2, %1, %0" : "+v"(a) : "v"(w), "v"(x));
        return a;
    }
    static Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
    static __m512 real(Sum a) { return _mm512_cvtepi32_ps(a); }
};

// ---------------------------------------------------------------------------------------------------------------- codes
// A reader is told of a panel, then of word after word; get<j>(h) is the j-th operand of its half h (16 rows).

template <int BITS> struct Shared : Float {  // words of 16 bits hold 16/BITS codes: the permutation looks at five bits of each, of which the table ignores some
    enum { PER = 16 / BITS, SIZE = 128 };
    __m512i table, word[2];
    Shared(const Weight &w, int64_t) : table(_mm512_loadu_si512(w.table)) {}
    void next(const uint8_t *p) { word[0] = _mm512_loadu_si512(p), word[1] = _mm512_loadu_si512(p + 64); }
    template <int J> __m512i get(int h) { return _mm512_permutexvar_epi16(_mm512_srli_epi16(word[h], BITS * J), table); }
};

template <int BITS> struct PerRow : Float {  // a register is a table of 32 words, of 32 / 2^BITS rows: the row's number stands before its code
    enum { PER = 16 / BITS, SIZE = 128, EACH = BITS == 1 ? 1 : 1 << (BITS - 1) };  // registers of 16 rows
    __m512i table[2][EACH], row, word[2];
    PerRow(const Weight &w, int64_t panel) {
        const uint16_t *t = w.table + (panel * ROWS << BITS);
        for (int h = 0; h < 2; h++)
            for (int e = 0; e < EACH; e++) table[h][e] = _mm512_loadu_si512(t + (h * EACH + e) * 32);
        uint16_t r[32];
        for (int i = 0; i < 32; i++) r[i] = (i / 2) << BITS;
        row = _mm512_loadu_si512(r);
    }
    void next(const uint8_t *p) { word[0] = _mm512_loadu_si512(p), word[1] = _mm512_loadu_si512(p + 64); }
    template <int J> __m512i get(int h) {
        __m512i i = _mm512_ternarylogic_epi32(_mm512_srli_epi16(word[h], BITS * J), _mm512_set1_epi16((1 << BITS) - 1), row, 0xEA);  // code & mask | row
        if (EACH == 1) return _mm512_permutexvar_epi16(i, table[h][0]);
        __m512i v = _mm512_permutex2var_epi16(table[h][0], i, table[h][EACH > 1 ? 1 : 0]);
#pragma GCC unroll 8
        for (int e = 2; e < EACH; e += 2)  // 64 words are 64 / 2^BITS rows, two lanes each
            v = _mm512_mask_blend_epi16(0xFFFFFFFFu << (64 >> BITS) * e, v, _mm512_permutex2var_epi16(table[h][e], i, table[h][e + 1]));
        return v;
    }
};

static inline __m512i pairs(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

struct Byte : Float {  // integers of five to eight bits, all of them numbers of bf16
    enum { PER = 1, SIZE = 64 };
    __m512i word;
    __m512 center;
    Byte(const Weight &w, int64_t) : center(_mm512_set1_ps(w.center)) {}
    void next(const uint8_t *p) { word = _mm512_loadu_si512(p); }
    __m512 number(__m128i b) { return _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(b)), center); }
    template <int J> __m512i get(int h) {
        __m256i b = h ? _mm512_extracti64x4_epi64(word, 1) : _mm512_castsi512_si256(word);
        return pairs(number(_mm256_castsi256_si128(b)), number(_mm256_extracti128_si256(b, 1)));
    }
};

struct E4M3 : Byte {  // its bits moved into an fp16 are 2^-8 of its value, subnormal numbers too
    E4M3(const Weight &w, int64_t p) : Byte(w, p) {}
    __m512 half(__m128i b) {
        __m256i u = _mm256_cvtepu8_epi16(b), s = _mm256_slli_epi16(_mm256_and_si256(u, _mm256_set1_epi16(128)), 8);
        return _mm512_cvtph_ps(_mm256_or_si256(s, _mm256_slli_epi16(_mm256_and_si256(u, _mm256_set1_epi16(127)), 7)));
    }
    template <int J> __m512i get(int h) {
        __m256i b = h ? _mm512_extracti64x4_epi64(word, 1) : _mm512_castsi512_si256(word);
        return pairs(half(_mm256_castsi256_si128(b)), half(_mm256_extracti128_si256(b, 1)));
    }
};

struct Sparse : Float {  // as many values as the mask has bits come from where the last ones ended
    enum { PER = 1, SIZE = 0 };
    const uint16_t *at;
    const uint32_t *mask;
    Sparse(const Weight &w, int64_t panel) : at((const uint16_t *)w.codes + w.starts[panel]), mask(w.masks + panel * w.blocks * w.words * 2 - 2) {}
    void next(const uint8_t *) { mask += 2; }
    template <int J> __m512i get(int h) {
        __m512i v = _mm512_maskz_expand_epi16(mask[h], _mm512_loadu_si512(at));
        at += _mm_popcnt_u32(mask[h]);
        return v;
    }
};

template <int BITS> struct Bytes : Int {  // 8/BITS codes a byte
    enum { PER = 8 / BITS, SIZE = 128, PLAIN = BITS == 8 };
    __m512i word[2];
    Bytes(const Weight &, int64_t) {}
    void next(const uint8_t *p) { word[0] = _mm512_loadu_si512(p), word[1] = _mm512_loadu_si512(p + 64); }
    template <int J> __m512i get(int h) {
        __m512i w = _mm512_srli_epi16(word[h], BITS * J);
        return BITS == 8 ? w : _mm512_and_si512(w, _mm512_set1_epi8((1 << BITS % 8) - 1));
    }
};

template <int J> struct Upto {  // calls f.each<0>() … f.each<J − 1>(): shifts and tables want constants
    template <class F> static void run(F &f) { Upto<J - 1>::run(f), f.template each<J - 1>(); }
};
template <> struct Upto<0> {
    template <class F> static void run(F &) {}
};

// ---------------------------------------------------------------------------------------------------------------- products

struct Input {
    const uint8_t *x;      // [blocks, m, pitch]: bf16 or int8, zero behind the columns
    const float *sums;     // [blocks, m]
    const float *token;    // [m], or null
    int64_t m, pitch;      // pitch: bytes of a block of a token
};

struct Output {
    void *y;
    const void *bias;
    int type, bias_type;
};

static inline __m512i broadcast(const uint8_t *x) {
    int32_t v;
    memcpy(&v, x, 4);
    return _mm512_set1_epi32(v);
}

static inline __m512 corrected(const Weight &w, const Input &in, int64_t block, int64_t token, int64_t at, __m512 sum) {
    if (!w.zeros && !w.zero) return sum;
    __m512 z = w.zeros ? factors(w.zeros, w.wide, at) : _mm512_set1_ps(w.zero);
    return _mm512_fnmadd_ps(z, _mm512_set1_ps(in.sums[block * in.m + token]), sum);
}

static void finish(const Weight &w, const Input &in, const Output &out, int64_t token, int64_t panel, __m512 low, __m512 high) {
    float scale = w.alpha * (in.token ? in.token[token] : 1.0f);
    for (int h = 0; h < 2; h++) {
        int64_t n = panel * ROWS + 16 * h, left = w.n - n;
        if (left <= 0) return;
        __mmask16 k = left >= 16 ? 0xFFFF : (1 << left) - 1;
        __m512 y = _mm512_mul_ps(h ? high : low, _mm512_set1_ps(scale));
        if (out.bias) y = _mm512_add_ps(y, read16(out.bias, out.bias_type, n, k));
        write16(out.y, out.type, token * w.n + n, y, k);
    }
}

template <class R, int M> struct Use {  // operands of a word are multiplied as they are decoded
    enum { SUMS = M < 3 ? 2 : 1 };      // that do not wait for each other
    R &r;
    typename R::Sum (&sum)[M][2][SUMS];
    const uint8_t *x;
    int64_t pitch;
    template <int J> void each() {
        __m512i low = r.template get<J>(0), high = r.template get<J>(1);
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) {
            __m512i v = broadcast(x + i * pitch + 4 * J);
            sum[i][0][J % SUMS] = R::dot(sum[i][0][J % SUMS], low, v);
            sum[i][1][J % SUMS] = R::dot(sum[i][1][J % SUMS], high, v);
        }
    }
};

template <class R, int M> static void few(const Weight &w, const Input &in, const Output &out, int64_t first, int64_t panel) {
    enum { SUMS = Use<R, M>::SUMS };
    R r(w, panel);
    __m512 y[M][2];
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) y[i][0] = y[i][1] = _mm512_setzero_ps();
    const uint8_t *p = w.codes + panel * w.blocks * w.words * R::SIZE;
    for (int64_t b = 0; b < w.blocks; b++) {
        typename R::Sum sum[M][2][SUMS];
#pragma GCC unroll 4
        for (int i = 0; i < M; i++)
#pragma GCC unroll 4
            for (int u = 0; u < SUMS; u++) sum[i][0][u] = sum[i][1][u] = R::none();
        const uint8_t *x = in.x + (b * in.m + first) * in.pitch;
        for (int64_t t = 0; t < w.words; t++, p += R::SIZE, x += 4 * R::PER) {
            r.next(p);
            Use<R, M> use = {r, sum, x, in.pitch};
            Upto<R::PER>::run(use);
        }
        int64_t at = (panel * w.blocks + b) * ROWS;
#pragma GCC unroll 4
        for (int h = 0; h < 2; h++) {
            __m512 s = factors(w.scales, w.wide, at + 16 * h);
#pragma GCC unroll 4
            for (int i = 0; i < M; i++) {
                __m512 v = R::real(SUMS == 2 ? R::add(sum[i][h][0], sum[i][h][SUMS - 1]) : sum[i][h][0]);
                y[i][h] = _mm512_fmadd_ps(s, corrected(w, in, b, first + i, at + 16 * h, v), y[i][h]);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) finish(w, in, out, first + i, panel, y[i][0], y[i][1]);
}

template <class R> struct Keep {  // operands of a word go into the cache
    R &r;
    __m512i (*at)[2];
    template <int J> void each() { at[J][0] = r.template get<J>(0), at[J][1] = r.template get<J>(1); }
};

struct Span {  // blocks of columns whose operands are decoded: `count` from `first` on, `length` operands each
    int64_t first, count, length;
    const __m512i (*weight)[2];
    const uint8_t *ahead;  // what is to be fetched meanwhile, `stride` bytes an operand
    int64_t stride;
};

template <class D, int M> static void tile(const Weight &w, const Input &in, const Span &span, int64_t token, int64_t panel, __m512 (*y)[2]) {
    const __m512i (*weight)[2] = span.weight;
    const uint8_t *ahead = span.ahead;
    __m512 total[M][2];
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) total[i][0] = y[i][0], total[i][1] = y[i][1];
    for (int64_t b = span.first; b < span.first + span.count; b++) {
        typename D::Sum sum[M][2];
#pragma GCC unroll 12
        for (int i = 0; i < M; i++) sum[i][0] = sum[i][1] = D::none();
        const uint8_t *x = in.x + (b * in.m + token) * in.pitch;
        for (int64_t t = 0; t < span.length; t++, x += 4, weight++, ahead += span.stride) {
            _mm_prefetch(ahead, _MM_HINT_T1), _mm_prefetch(ahead + 64, _MM_HINT_T1);
            __m512i low = _mm512_loadu_si512(weight[0]), high = _mm512_loadu_si512(weight[0] + 1);
#pragma GCC unroll 12
            for (int i = 0; i < M; i++) {
                __m512i v = broadcast(x + i * in.pitch);
                sum[i][0] = D::dot(sum[i][0], low, v);
                sum[i][1] = D::dot(sum[i][1], high, v);
            }
        }
        int64_t at = (panel * w.blocks + b) * ROWS;
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            __m512 s = factors(w.scales, w.wide, at + 16 * h);
#pragma GCC unroll 12
            for (int i = 0; i < M; i++) total[i][h] = _mm512_fmadd_ps(s, corrected(w, in, b, token + i, at + 16 * h, D::real(sum[i][h])), total[i][h]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) y[i][0] = total[i][0], y[i][1] = total[i][1];
}

template <class R> static void many(const Weight &w, const Input &in, const Output &out, int64_t first, int64_t tokens, int64_t panel) {
    typedef typename R::Dot D;
    static void (*const tiles[])(const Weight &, const Input &, const Span &, int64_t, int64_t, __m512 (*)[2]) = {
        0, tile<D, 1>, tile<D, 2>, tile<D, 3>, tile<D, 4>, tile<D, 5>, tile<D, 6>, tile<D, 7>, tile<D, 8>, tile<D, 9>, tile<D, 10>, tile<D, 11>, tile<D, 12>};
    R r(w, panel);
    __m512i weight[OPERANDS][2];
    __m512 y[TOKENS][2];
    for (int64_t i = 0; i < tokens; i++) y[i][0] = y[i][1] = _mm512_setzero_ps();
    const uint8_t *p = w.codes + panel * w.blocks * w.words * R::SIZE;
    int64_t length = w.words * R::PER, together = length > 24 ? 1 : OPERANDS / length;  // of short blocks several: their totals stay in registers, of half a tile
    int64_t most = together > 1 ? TILE / 2 : TILE;
    for (int64_t b = 0; b < w.blocks; b += together) {
        int64_t count = w.blocks - b < together ? w.blocks - b : together;
        Span span = {b, count, length, weight, 0, R::SIZE / R::PER};
        if (R::PLAIN) span.weight = (const __m512i (*)[2])p, p += count * w.words * R::SIZE;  // bytes lie in memory as they are multiplied
        else
            for (int64_t t = 0; t < count * w.words; t++, p += R::SIZE) {
                r.next(p);
                Keep<R> keep = {r, weight + t * R::PER};
                Upto<R::PER>::run(keep);
            }
        span.ahead = p;
        for (int64_t i = 0; i < tokens; i += most, span.stride = 0)  // the first tile fetches the next codes
            tiles[tokens - i < most ? tokens - i : most](w, in, span, first + i, panel, y + i);
    }
    for (int64_t i = 0; i < tokens; i++) finish(w, in, out, first + i, panel, y[i][0], y[i][1]);
}

template <class R> static void panel(const Weight &w, const Input &in, const Output &out, int64_t first, int64_t tokens, int64_t p) {
    if (tokens == 1) few<R, 1>(w, in, out, first, p);
    else if (tokens == 2) few<R, 2>(w, in, out, first, p);
    else if (tokens == 3) few<R, 3>(w, in, out, first, p);
    else if (tokens == 4) few<R, 4>(w, in, out, first, p);
    else many<R>(w, in, out, first, tokens, p);
}

// ---------------------------------------------------------------------------------------------------------------- activations

static void copy_token(const Weight &w, const uint16_t *x, int64_t i, int64_t m, int64_t pitch, uint8_t *to, float *sums) {
    for (int64_t b = 0; b < w.blocks; b++) {
        int64_t length = w.k - b * w.block < w.block ? w.k - b * w.block : w.block;
        uint8_t *at = to + (b * m + i) * pitch;
        memcpy(at, x + b * w.block, 2 * length);
        memset(at + 2 * length, 0, pitch - 2 * length);
        if (!w.zeros) continue;  // nobody asks for sums
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < length; j += 16)
            sum = _mm512_add_ps(sum, read16(x + b * w.block, BF16, j, length - j >= 16 ? 0xFFFF : (1 << (length - j)) - 1));
        sums[b * m + i] = _mm512_reduce_add_ps(sum);
    }
}

static float round_token(const Weight &w, const void *x, int type, float largest, int64_t i, int64_t m, int64_t pitch, uint8_t *to, float *sums) {
    __m512i top = _mm512_setzero_si512();  // of magnitudes, as integers: what is not a number is larger than any
    for (int64_t j = 0; j < w.k; j += 16) {
        __m512i bits = (__m512i)read16(x, type, i * w.k + j, w.k - j >= 16 ? 0xFFFF : (1 << (w.k - j)) - 1);
        top = _mm512_max_epi32(top, _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF)));
    }
    int32_t bits = _mm512_reduce_max_epi32(top);
    float scale;
    memcpy(&scale, &bits, 4);
    scale /= largest;
    __m512 inverse = _mm512_set1_ps(1.0f / scale);
    for (int64_t b = 0; b < w.blocks; b++) {
        int64_t length = w.k - b * w.block < w.block ? w.k - b * w.block : w.block;
        uint8_t *at = to + (b * m + i) * pitch;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t j = 0; j < length; j += 16) {
            __mmask16 k = length - j >= 16 ? 0xFFFF : (1 << (length - j)) - 1;
            __m512i q = _mm512_maskz_cvtps_epi32(k, _mm512_mul_ps(read16(x, type, i * w.k + b * w.block + j, k), inverse));
            sum = _mm512_add_epi32(sum, q);
            _mm_mask_storeu_epi8(at + j, k, _mm512_cvtsepi32_epi8(q));
        }
        memset(at + length, 0, pitch - length);
        sums[b * m + i] = (float)_mm512_reduce_add_epi32(sum);
    }
    return scale;
}

template <class R> static int run(const Weight &w, const void *x, int type, float largest, int64_t m, const Output &out, int threads) {
    if (!R::PLAIN && w.words * R::PER > OPERANDS) return 1;
    int64_t pitch = 4 * R::PER * w.words, panels = (w.n + ROWS - 1) / ROWS, passes = (m + TOKENS - 1) / TOKENS, tokens = (m + passes - 1) / passes;
    int64_t size = w.blocks * m * pitch, numbers = 4 * m * (w.blocks + 1);
    uint8_t *copy = (uint8_t *)aligned_alloc(64, (size + numbers + 63) / 64 * 64);
    if (!copy) return 2;
    float *sums = (float *)(copy + size), *token = sums + w.blocks * m;
    Input in = {copy, sums, R::ROUNDED ? token : 0, m, pitch};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; i++)
            if (R::ROUNDED) token[i] = round_token(w, x, type, largest, i, m, pitch, copy, sums);
            else copy_token(w, (const uint16_t *)x + i * w.k, i, m, pitch, copy, sums);
#pragma omp for schedule(static) collapse(2)
        for (int64_t i = 0; i < passes; i++)
            for (int64_t p = 0; p < panels; p++) panel<R>(w, in, out, i * tokens, m - i * tokens < tokens ? m - i * tokens : tokens, p);
    }
    free(copy);
    return 0;
}

enum Kind { SHARED, PER_ROW, BYTE, FP8, SPARSE, INTEGERS };

// x [m, k] of a type above → y [m, n]. 0; 1 where there is no such kind of weight, 2 where memory is short.
extern "C" int multiply(const Weight *w, const void *x, int type, float largest, int64_t m, void *y, int y_type, const void *bias, int bias_type, int threads) {
    Output out = {y, bias, y_type, bias_type};
#define CASE(k, b, ...) \
    case 16 * k + b: return run<__VA_ARGS__>(*w, x, type, largest, m, out, threads);
    switch (16 * w->kind + w->bits) {
        CASE(SHARED, 1, Shared<1>) CASE(SHARED, 2, Shared<2>) CASE(SHARED, 3, Shared<3>) CASE(SHARED, 4, Shared<4>)
        CASE(PER_ROW, 1, PerRow<1>) CASE(PER_ROW, 2, PerRow<2>) CASE(PER_ROW, 3, PerRow<3>) CASE(PER_ROW, 4, PerRow<4>)
        CASE(INTEGERS, 1, Bytes<1>) CASE(INTEGERS, 2, Bytes<2>) CASE(INTEGERS, 4, Bytes<4>) CASE(INTEGERS, 8, Bytes<8>)
        CASE(BYTE, 8, Byte) CASE(FP8, 8, E4M3) CASE(SPARSE, 0, Sparse)
    }
    return 1;
}
