"""PH-Reg (arXiv 2505.21501): register tokens and a teacher averaged over views."""
