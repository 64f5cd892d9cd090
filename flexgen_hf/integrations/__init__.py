"""Other programs' doors to this package: each module fits one of them, which need not be installed."""
