"""What a lossy codec costs a real model, and the calibration it needs: Hugging Face, on the CPU.

Imports torch and transformers, inside functions or in modules that only its commands import.
"""
