"""`python -m fairseq_quant_noise VERB`."""

from .cli.main import main

main()
