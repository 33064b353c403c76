"""What others wrote: files, texts and expressions, read with bounds, checked for types, never obeyed as code."""
