"""A pytest plugin that has sentence-transformers' own tests run against our losses. In a checkout
of that library, whose tests download small models:

    PYTHONPATH=THIS_FOLDER pytest -p sentence_transformers_drop_in tests/sentence_transformer/losses
"""

from sentence_transformers.sentence_transformer import losses

from mrl_fast.integrations.sentence_transformers import Matryoshka2dLoss, MatryoshkaLoss

losses.MatryoshkaLoss, losses.Matryoshka2dLoss = MatryoshkaLoss, Matryoshka2dLoss
