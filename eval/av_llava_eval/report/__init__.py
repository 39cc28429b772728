"""Reports of one run or of several: Markdown, and one HTML page with plots and wrong answers."""
