"""The jobs that a study is a graph of: tokenizer, tokens, execution, trunks, branches, evaluations."""
