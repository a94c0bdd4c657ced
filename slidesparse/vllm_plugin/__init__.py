"""vLLM without a fork: BitNet and our W8A8 linears as a plugin (entry point `register.register`).

`settings`, `versions`, `buckets`, `shards` and `linear_op` need no vLLM; `register`, `linear_kernels`, `bitnet` and
`model_paths` are imported by vLLM, or by what runs inside it.
"""
