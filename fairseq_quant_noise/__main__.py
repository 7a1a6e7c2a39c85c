"""`python -m fairseq_quant_noise VERB`."""

from .cli import main

main()
