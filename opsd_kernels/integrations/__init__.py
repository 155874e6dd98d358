"""What the engine needs of other libraries' models; nothing here is imported with `opsd_kernels` itself."""
