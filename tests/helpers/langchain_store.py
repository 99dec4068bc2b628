"""A small LangChain store, and what its tests share."""

import threading

from langchain_core.embeddings import Embeddings

from mrl_fast.integrations.langchain import MatryoshkaVectorStore


class Letters(Embeddings):
    """A text's vector is how often each of 26 letters occurs in it."""

    def embed_query(self, text):
        return [float(text.count(chr(ord("a") + i))) for i in range(26)]

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]


TEXTS = ["aab", "abb", "bbb", "ccc", "ccd"]


def store(**options):
    metadatas = [{"n": i, "kind": "ab" if i < 3 else "cd"} for i in range(5)]
    ids = [f"id{i}" for i in range(5)]
    return MatryoshkaVectorStore.from_texts(TEXTS, Letters(), metadatas, ids=ids, **options)


def names(documents):
    return [document.id for document in documents]


def contents(found):
    documents = [(document.id, document.page_content) for document in found._records.values()]
    return documents, found.index.reconstruct(found.index.ids).tolist()


def in_threads(*functions):
    failures = []

    def run(function):
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
