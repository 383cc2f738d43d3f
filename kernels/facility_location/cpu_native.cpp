// facility_location on a CPU: what Python calls. gains.h has the gains of all candidates, shortlists.h the few that a point
// may still lose to, exact_rows.h the float64 similarities that picks are decided by.

#include "exact_rows.h"
#include "export.h"
#include "gains.h"
#include "packed_rows.h"
#include "shortlists.h"

// Float64 similarities [b, m] of rows to all points. rows: float64, padded with zeros to a multiple of 4 rows and of 16
// columns (padded_d). points [m, d] of `type` as below, or 3 float64. lengths: what dot products are divided by, or null.
// workspace: 4 * padded_d doubles a thread.
FASTSEL_EXPORT(facility_location_rows)(
    const double* rows, int64_t b, int64_t padded_d, const void* points, int64_t stride, int32_t type, int64_t m,
    int64_t d, const double* lengths, int32_t similarity, double gamma, int32_t threads, double* workspace,
    double* out) {
#pragma omp parallel num_threads(threads)
    {
        double* const widened_points = workspace + omp_get_thread_num() * EXACT_POINTS * padded_d;
        double tile[EXACT_ROWS][EXACT_POINTS];
#pragma omp for schedule(static)
        for (int64_t v = 0; v < m; v += EXACT_POINTS) {
            const int64_t count = smaller(EXACT_POINTS, m - v);
            for (int64_t p = 0; p < EXACT_POINTS; ++p)
                widen_row(points, type, (v + smaller(p, count - 1)) * stride, d, padded_d, widened_points + p * padded_d);
            for (int64_t q = 0; q < b; q += EXACT_ROWS) {
                if (similarity == DOT)
                    exact_tile<false>(rows + q * padded_d, widened_points, padded_d, tile);
                else
                    exact_tile<true>(rows + q * padded_d, widened_points, padded_d, tile);
                for (int64_t r = 0; r < smaller(EXACT_ROWS, b - q); ++r)
                    for (int64_t p = 0; p < count; ++p) {
                        double s = tile[r][p];
                        if (similarity == DOT && lengths) s = lengths[v + p] > 0 ? s / lengths[v + p] : 0;
                        if (similarity == RBF) s = exp(-gamma * s);
                        if (similarity == EXP_DISTANCE) s = exp(-gamma * sqrt(s));
                        out[(q + r) * m + v + p] = s;
                    }
            }
        }
    }
}

// Which of the rows [b, d] (float32, b <= 32, at unit stride) may exceed best at which of m packed points: a bit of masks
// [m] for each row, and counts [groups of ROWS points][32] of them. workspace: 33 * d + 96 floats.
FASTSEL_EXPORT(facility_location_screen)(
    const float* panels, int32_t in_bytes, int64_t m, int64_t d, const float* rows, int64_t b, const double* best,
    int32_t threads, float* workspace, uint32_t* masks, int32_t* counts) {
    const int64_t groups = divided_up(m, ROWS);
    const Packed points(panels, in_bytes != 0, groups * ROWS, d);
    memset(masks, 0, m * sizeof(uint32_t));
    for (int64_t first = 0; first < b; first += TILE_COLUMNS) {
        float scales[TILE_COLUMNS] = {};
        const Screened screened =
            pack_screened({rows, d, b, FLOAT32}, first, in_bytes != 0, d, scales, aligned(workspace));
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t group = 0; group < groups; ++group)
            screen_group(
                points, group * ROWS, smaller(ROWS, m - group * ROWS), d, screened, static_cast<int>(first), best, masks);
    }
    const uint32_t real = b < SCREENED ? (uint32_t{1} << b) - 1 : ~uint32_t{0};
    for (int64_t group = 0; group < groups; ++group) {
        int32_t* const of_group = counts + group * SCREENED;
        memset(of_group, 0, SCREENED * sizeof(int32_t));
        for (int64_t v = group * ROWS; v < smaller((group + 1) * ROWS, m); ++v) {
            masks[v] &= real;
            for (uint32_t bits = masks[v]; bits; bits &= bits - 1) ++of_group[__builtin_ctz(bits)];
        }
    }
}

// Float64 similarities of the pairs in masks. rows: float64 [b, padded_d], filled with zeros to a multiple of 32; points,
// lengths as in facility_location_rows. places [groups][32]: where the first pair of a row within a group goes; left past
// the last. workspace: padded_d doubles a thread.
FASTSEL_EXPORT(facility_location_pairs)(
    const uint32_t* masks, int64_t* places, const double* rows, int64_t padded_d, const void* points, int64_t stride,
    int32_t type, int64_t m, int64_t d, const double* lengths, int32_t threads, double* workspace, int32_t* numbers,
    double* similarities) {
#pragma omp parallel num_threads(threads)
    {
        double* const point = workspace + omp_get_thread_num() * padded_d;
#pragma omp for schedule(dynamic, 1)
        for (int64_t group = 0; group < divided_up(m, ROWS); ++group)
            for (int64_t v = group * ROWS; v < smaller((group + 1) * ROWS, m); ++v) {
                if (!masks[v]) continue;
                widen_row(points, type, v * stride, d, padded_d, point);
                for (uint32_t bits = masks[v]; bits; bits &= bits - 1) {
                    const int64_t row = __builtin_ctz(bits), at = places[group * SCREENED + row]++;
                    const double s = exact_product(rows + row * padded_d, point, padded_d);
                    numbers[at] = static_cast<int32_t>(v);
                    similarities[at] = !lengths ? s : lengths[v] > 0 ? s / lengths[v] : 0;
                }
            }
    }
}

// How many candidates the shortlists of m points hold, -1 where a group of candidates overflows; listed as above.
FASTSEL_EXPORT(facility_location_list_sizes)(
    uint8_t* listed, uint8_t* overflows, int64_t n, int64_t m, int64_t* sizes) {
    const Shortlists lists{listed, nullptr, overflows, nullptr, m};
    for (int64_t v = 0; v < m; ++v) sizes[v] = lists.size(v, divided_up(n, ROWS));
}

// Copies the shortlists of `count` of the m points (numbers) to candidates and similarities, from starts[i] on.
FASTSEL_EXPORT(facility_location_list_copy)(
    uint8_t* listed, uint8_t* listed_rows, float* listed_similarities, int64_t n, int64_t m, const int64_t* numbers,
    int64_t count, const int64_t* starts, int32_t threads, int32_t* candidates, float* similarities) {
    const Shortlists lists{listed, listed_rows, nullptr, listed_similarities, m};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i)
        lists.copy(numbers[i], divided_up(n, ROWS), candidates + starts[i], similarities + starts[i]);
}

// Takes from gains [n] what candidates lose where the best of `count` points (numbers) rises from before to after [count],
// by the points' shortlists, and drops from these who cannot improve the point any more. starts, sizes, weights: of all
// points; weights may be null.
FASTSEL_EXPORT(facility_location_list_losses)(
    const int64_t* numbers, int64_t count, const float* before, const float* after, const float* weights,
    const int64_t* starts, int64_t* sizes, int32_t* candidates, float* similarities, double* gains) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t v = numbers[i], start = starts[v];
        int64_t left = 0;
        for (int64_t at = start; at < start + sizes[v]; ++at) {
            const float s = similarities[at];
            const int32_t candidate = candidates[at];
            if (s <= before[i]) continue;
            const float loss = s > after[i] ? (s - before[i]) - (s - after[i]) : s - before[i];
            gains[candidate] -= weights ? loss * weights[v] : loss;
            if (s <= after[i]) continue;
            similarities[start + left] = s, candidates[start + left++] = candidate;
        }
        sizes[v] = left;
    }
}

// Moves the lists of `count` points (numbers, in the order in which their lists lie) to the front, one after another.
FASTSEL_EXPORT(facility_location_list_close)(
    const int64_t* numbers, int64_t count, int64_t* starts, const int64_t* sizes, int32_t* candidates, float* similarities) {
    int64_t used = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t v = numbers[i];
        memmove(candidates + used, candidates + starts[v], sizes[v] * sizeof(int32_t));
        memmove(similarities + used, similarities + starts[v], sizes[v] * sizeof(float));
        starts[v] = used, used += sizes[v];
    }
}

// How many floats of room n packed candidates take, in floats or in bytes.
FASTSEL_EXPORT(facility_location_packed)(int64_t n, int64_t d, int32_t in_bytes, int64_t* floats) {
    const int64_t padded = divided_up(n, ROWS) * ROWS;
    *floats = Packed::floats(in_bytes != 0, padded, d);
}

// How many floats of workspace facility_location needs.
FASTSEL_EXPORT(facility_location_workspace)(
    int64_t n, int64_t m, int64_t d, int32_t itself, int32_t threads, int64_t* floats) {
    *floats = Layout(n, m, d, itself != 0).floats(d, threads);
}

// Packs candidates [n, d] of `type` (0 float32, 1 bfloat16, 2 float16); stride is elements from row to row. In bytes,
// workspace is d floats a thread.
FASTSEL_EXPORT(facility_location_pack)(
    const void* candidates, int64_t stride, int32_t type, int64_t n, int64_t d, int32_t in_bytes, int32_t threads,
    float* workspace, float* panels) {
    const Matrix matrix{candidates, stride, n, static_cast<ElementType>(type)};
    const int64_t padded = divided_up(n, ROWS) * ROWS, quads = (d + 3) / 4;
    const Packed packed(panels, in_bytes != 0, padded, d);
    float* const lengths = const_cast<float*>(packed.lengths);
    if (in_bytes) {
        uint8_t* const bytes = reinterpret_cast<uint8_t*>(panels);
        float* const scales = const_cast<float*>(packed.scales);
        int32_t* const offsets = const_cast<int32_t*>(packed.offsets);
        float* const rests = const_cast<float*>(packed.rests);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t i = 0; i < padded; i += TILE_ROWS)
            pack_bytes<TILE_ROWS>(
                matrix, i, n - i, d, 0, workspace + omp_get_thread_num() * d, bytes + i * quads * 4, scales + i,
                offsets + i, lengths + i, rests + i);
        return;
    }
    float* const squares = const_cast<float*>(packed.squares);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < padded; i += TILE_ROWS) {
        if (i < n)
            pack_panel<TILE_ROWS>(matrix.type, matrix.row(i), stride, n - i, d, panels + i * d);
        else
            memset(panels + i * d, 0, TILE_ROWS * d * sizeof(float));
        lengths_of_panel<TILE_ROWS>(panels + i * d, d, lengths + i, squares + i);
    }
}

// panels holds n packed candidates (in_bytes takes dot products of AVX-512 VNNI only); points [m, d] as above. raised
// and weights may be null; similarity is 0 dot, 1 rbf, 2 exp_distance; itself: the points are the candidates and raised
// is null. gains receives n sums. listed, or null, with the three behind it: see Shortlists; raised is given.
FASTSEL_EXPORT(facility_location)(
    const float* panels, int32_t in_bytes, int64_t n, int64_t d, const void* points, int64_t stride, int32_t type, int64_t m,
    const float* best, const float* raised, const float* weights, int32_t similarity, float gamma, int32_t itself,
    int32_t threads, float* workspace, double* gains, uint8_t* listed, uint8_t* listed_rows, uint8_t* overflows,
    float* listed_similarities) {
    const Shortlists lists{listed, listed_rows, overflows, listed_similarities, m};
    if (listed) memset(overflows, 0, divided_up(m, TILE_COLUMNS) * TILE_COLUMNS);
    const Problem problem{
        {points, stride, m, static_cast<ElementType>(type)}, best, raised, weights, n, d,
        static_cast<Similarity>(similarity), gamma, itself != 0, listed ? &lists : nullptr};
    const Packed candidates(panels, in_bytes != 0, divided_up(n, ROWS) * ROWS, d);
    if (raised)
        run<true>(problem, candidates, threads, workspace, gains);
    else
        run<false>(problem, candidates, threads, workspace, gains);
}
