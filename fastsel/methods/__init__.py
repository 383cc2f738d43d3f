"""One paper, one file, one public function: which features and which selector, in the paper's order."""
