// label_gain on a CPU: sparse rows of label values against a table with one number a label.
//
// The table holds phi'(state) (first order) or phi(state) (exact). It is made whole where at least as many entries are
// read as there are labels, and otherwise evaluated at the entries: a greedy step that asks for a few dozen rows pays
// for their labels only. Both ways call the same function with the same argument, so a row's bits do not depend on the
// rows asked for beside it. A row is summed in the order of its entries by one thread.

#include <math.h>
#include <omp.h>
#include <stdint.h>

#include "export.h"

namespace {

constexpr int64_t SERIAL_ENTRIES = 1 << 16;  // waking the other threads costs as much as reading these

struct Curve {
    bool exponential;
    double a, b, alpha;

    double information(double x) const { return exponential ? 1.0 - exp(-alpha * x) : pow(x + a, b); }
    double slope(double x) const { return exponential ? alpha * exp(-alpha * x) : b * pow(x + a, b - 1.0); }
};

template <typename Value>
struct Rows {
    const int64_t* indptr;
    const int32_t* indices;
    const Value* values;
};

template <typename Value, bool EXACT, bool TABLE>
static double gain_of_row(
    const Rows<Value>& rows, int64_t row, const double* state, const double* table, const Curve& curve) {
    double gain = 0.0;
    for (int64_t i = rows.indptr[row]; i < rows.indptr[row + 1]; ++i) {
        const int32_t label = rows.indices[i];
        const double value = static_cast<double>(rows.values[i]);
        const double here = TABLE ? table[label] : EXACT ? curve.information(state[label]) : curve.slope(state[label]);
        gain += EXACT ? curve.information(state[label] + value) - here : value * here;
    }
    return gain;
}

template <typename Value, bool EXACT>
static void run(
    const Rows<Value>& rows, const double* state, int64_t labels, const int64_t* chosen, int64_t count,
    const Curve& curve, int threads, double* table, double* gains) {
    int64_t entries = chosen ? 0 : rows.indptr[count];
    for (int64_t i = 0; chosen && i < count; ++i) entries += rows.indptr[chosen[i] + 1] - rows.indptr[chosen[i]];
    const bool has_table = entries >= labels;
#pragma omp parallel num_threads(threads) if (threads > 1 && entries > SERIAL_ENTRIES)
    {
        if (has_table) {
#pragma omp for schedule(static)
            for (int64_t l = 0; l < labels; ++l)
                table[l] = EXACT ? curve.information(state[l]) : curve.slope(state[l]);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = chosen ? chosen[i] : i;
            gains[i] = has_table ? gain_of_row<Value, EXACT, true>(rows, row, state, table, curve)
                                 : gain_of_row<Value, EXACT, false>(rows, row, state, table, curve);
        }
    }
}

template <typename Value>
static void run_rule(
    bool exact, const Rows<Value>& rows, const double* state, int64_t labels, const int64_t* chosen, int64_t count,
    const Curve& curve, int threads, double* table, double* gains) {
    if (exact)
        run<Value, true>(rows, state, labels, chosen, count, curve, threads, table, gains);
    else
        run<Value, false>(rows, state, labels, chosen, count, curve, threads, table, gains);
}

}  // namespace

// values hold float (value_type 0) or double (1); chosen may be null, and then rows 0 .. count - 1 are evaluated. table
// has room for one double a label.
FASTSEL_EXPORT(label_gain)(
    const int64_t* indptr, const int32_t* indices, const void* values, int32_t value_type, const double* state,
    int64_t labels, const int64_t* chosen, int64_t count, int32_t exact, int32_t exponential, double a, double b,
    double alpha, int32_t threads, double* table, double* gains) {
    const Curve curve{exponential != 0, a, b, alpha};
    if (value_type == 0) {
        const Rows<float> rows{indptr, indices, static_cast<const float*>(values)};
        run_rule(exact != 0, rows, state, labels, chosen, count, curve, threads, table, gains);
    } else {
        const Rows<double> rows{indptr, indices, static_cast<const double*>(values)};
        run_rule(exact != 0, rows, state, labels, chosen, count, curve, threads, table, gains);
    }
}
