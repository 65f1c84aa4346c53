-- The four tables that the app and this service share, for Supabase (Postgres 15 and later).
--
-- Who may do what:
--   anon            nothing
--   authenticated   reads its own rows, writes nothing
--   service_role    everything; it bypasses row level security. Only it updates results
--
-- It can be applied again at any time: what is there stays, and policies, grants and the trigger are set anew.

begin;

create table if not exists public.users_profile (
    id uuid primary key references auth.users (id) on delete cascade,
    tier text not null default 'free',
    credits integer not null default 0 constraint users_profile_credits_check check (credits >= 0)
);

create table if not exists public.projects (
    id uuid primary key default gen_random_uuid(),
    user_id uuid not null references auth.users (id) on delete cascade,
    name text not null
);

create table if not exists public.segmentation_results (
    id uuid primary key default gen_random_uuid(),
    project_id uuid references public.projects (id) on delete cascade,
    user_id uuid not null references auth.users (id) on delete cascade,
    source_image_url text not null,
    mask_image_url text,
    text_prompt text not null,
    status text not null default 'pending' constraint segmentation_results_status_check
        check (status in ('pending', 'processing', 'done', 'error')),
    labels text[] not null default '{}',
    metadata jsonb not null default '{}'::jsonb,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);

create table if not exists public.usage_logs (
    id uuid primary key default gen_random_uuid(),
    user_id uuid not null references auth.users (id) on delete cascade,
    action text not null,
    credits_used integer not null default 0 constraint usage_logs_credits_used_check check (credits_used >= 0)
);

create index if not exists projects_user_id_idx on public.projects (user_id);
create index if not exists segmentation_results_user_id_created_at_idx
    on public.segmentation_results (user_id, created_at desc);
create index if not exists segmentation_results_project_id_idx on public.segmentation_results (project_id);
-- What is still open: small, because nearly all rows are done. For finding jobs that were left behind.
create index if not exists segmentation_results_open_idx
    on public.segmentation_results (updated_at) where status in ('pending', 'processing');
create index if not exists usage_logs_user_id_idx on public.usage_logs (user_id);

create or replace function public.set_updated_at() returns trigger
    language plpgsql
    set search_path = ''
as $$
begin
    new.updated_at := now();
    return new;
end;
$$;

drop trigger if exists segmentation_results_set_updated_at on public.segmentation_results;
create trigger segmentation_results_set_updated_at
    before update on public.segmentation_results
    for each row execute function public.set_updated_at();

alter table public.users_profile enable row level security;
alter table public.projects enable row level security;
alter table public.segmentation_results enable row level security;
alter table public.usage_logs enable row level security;

-- `(select auth.uid())` is evaluated once per statement, not once per row.
drop policy if exists users_profile_owner_reads on public.users_profile;
create policy users_profile_owner_reads on public.users_profile
    for select to authenticated using ((select auth.uid()) = id);

drop policy if exists projects_owner_reads on public.projects;
create policy projects_owner_reads on public.projects
    for select to authenticated using ((select auth.uid()) = user_id);

drop policy if exists segmentation_results_owner_reads on public.segmentation_results;
create policy segmentation_results_owner_reads on public.segmentation_results
    for select to authenticated using ((select auth.uid()) = user_id);

drop policy if exists usage_logs_owner_reads on public.usage_logs;
create policy usage_logs_owner_reads on public.usage_logs
    for select to authenticated using ((select auth.uid()) = user_id);

-- Supabase grants new tables in `public` to all three roles by default; row level security alone would then
-- stand between anon and the rows. Take the grants back as well.
revoke all on table public.users_profile, public.projects, public.segmentation_results, public.usage_logs
    from public, anon, authenticated;
grant usage on schema public to authenticated, service_role;
grant select on table public.users_profile, public.projects, public.segmentation_results, public.usage_logs
    to authenticated;
grant select, insert, update, delete
    on table public.users_profile, public.projects, public.segmentation_results, public.usage_logs
    to service_role;

-- Realtime tells the app of every change of a result's row (row level security applies to what it sends).
do $$
begin
    if not exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime') then
        create publication supabase_realtime;
    end if;
    if not exists (
        select from pg_catalog.pg_publication_tables
        where pubname = 'supabase_realtime' and schemaname = 'public' and tablename = 'segmentation_results'
    ) then
        alter publication supabase_realtime add table public.segmentation_results;
    end if;
end;
$$;

commit;
