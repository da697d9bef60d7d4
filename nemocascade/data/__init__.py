"""Data pipeline from files to packed batches: readers, template, tokenizer, cache, loader."""
