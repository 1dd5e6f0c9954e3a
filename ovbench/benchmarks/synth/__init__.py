"""Small generated copies of the benchmarks in their true layouts."""
