/** The tables of `schema.prisma`, beyond those of the suite: nothing but SQL makes them, because `db push` needs an engine that would have to be downloaded. */
export const tables = `
  create table items (id int primary key, n int not null default 0);
  create table tags (id int primary key, label text not null unique, item_id int not null references items);
`
