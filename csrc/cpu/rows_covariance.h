// Covariances of rows: what is left where no kernel position has to be shifted.
#pragma once

#include "panel_source.h"

namespace kfac {

// Whether `rows_covariance` serves what is packed, and no better by every thread on samples of its own.
template <class T>
bool takes_rows(const PanelSource<T>& source, int threads);

// out [d, d] <- decay out + scale sum over pixels of all samples of a a^T, d = channels + bias. Sums go into `out`
// block by block, so that nothing of its size is held beside it.
template <class T>
void rows_covariance(const PanelSource<T>& source, bool bias, double decay, double scale, T* out, int threads);

}  // namespace kfac
