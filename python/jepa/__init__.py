"""A thin trainer for joint-embedding models, on the public API of vicreg_kernels.

`config` says what a run is made of, `methods` holds what can be trained, `launch` trains it;
`probe` and `surprise` say what was learned; `demo` shows it all.
"""
