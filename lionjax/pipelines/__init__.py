# SPDX-License-Identifier: Apache-2.0
"""Methods that combine models that stay as they are, such as a captioner and a language model behind an endpoint."""
