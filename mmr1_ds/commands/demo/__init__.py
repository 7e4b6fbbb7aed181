"""The built-in demo task: a tiny Qwen2.5-VL reads real handwritten digits and compares them."""
